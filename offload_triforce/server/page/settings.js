// The dialog of settings.
import { byId } from "./dom.js";
import { apiKey, keepApiKey, keepSettings, recallSettings } from "./store.js";

/** `onSaved`: told when they may have changed. Returns what opens the dialog; with true, at the API key. */
export function startSettings(onSaved) {
  const dialog = byId("settings");
  const { elements } = byId("settings-form");
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "save") return;
    const names = Object.keys(recallSettings());
    keepSettings(Object.fromEntries(names.map((name) => [name, elements[name].value])));
    keepApiKey(elements.key.value);
    onSaved();
  });
  // A plain button: Enter in a field presses the form's first submit button, which has to be the other one.
  byId("leave-settings").addEventListener("click", () => dialog.close("cancel"));
  return (atKey = false) => {
    if (dialog.open) return;
    for (const [name, value] of Object.entries(recallSettings())) elements[name].value = value;
    elements.key.value = apiKey();
    byId("key-note").textContent = atKey
      ? "This server wants an API key. It is kept until this tab is closed."
      : "Only if the server asks for one. Kept until this tab is closed.";
    dialog.returnValue = "cancel";
    dialog.showModal();
    if (atKey) elements.key.focus();
  };
}
