"""An engine's texts and the disk: whose text it is, and what its caches take."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload_triforce.errors import InputError
from offload_triforce.model.fingerprint import identify
from offload_triforce.model.identity import ModelIdentity
from offload_triforce.model.layout import ModelLayout
from offload_triforce.model.lock import Hold, awaited, do_and_undo, locks_of
from offload_triforce.model.prefill import Progress
from offload_triforce.runtime.held import KVShape
from offload_triforce.runtime.pool import Text
from offload_triforce.runtime.session_files import SavedText, open_text, save_text
from offload_triforce.runtime.shelf import Shelf
from offload_triforce.runtime.texts import Texts


class Saver:
    """Saves and loads the texts of one engine. Its model is recognised once, when that is first needed."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: ModelLayout,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Texts,
        shelf: str | None = None,
    ) -> None:
        """``texts``: of the engine. ``shelf``: a folder for those that memory has no room for, see ``Shelf``."""
        self._model, self._layout, self._tokenizer, self._texts = model, layout, tokenizer, texts
        self._identity: ModelIdentity | None = None
        if shelf is not None:
            texts.pool.use(Shelf(Path(shelf), self.identity(), KVShape.of(layout)))

    def save(self, text: Text, folder: Path, progress: Progress | None = None) -> SavedText:
        """Save what is held of a text, see ``save_text``; while that lasts, no answer goes on.

        Raises:
            BusyError: called by a callback of an answer or of another save.
        """
        identity = self.identity()
        with self._texts.turn():
            source = self._texts.source(text)
            if source is None:
                raise InputError("there is nothing to save yet: the session has not read any text")
            return save_text(folder, source, identity, progress and awaited(progress))

    def load(self, folder: Path, progress: Progress | None = None) -> Text:
        """A text on disk, see ``open_text``. It comes into the caches when it is gone on with.

        ``progress``: told (bytes read, bytes in all).

        Raises:
            InputError: there is none, it is damaged, or of another model. StorageError: it cannot be read.
        """
        source = open_text(folder, self.identity(), KVShape.of(self._layout), progress)
        with self._texts.turn():
            return self._texts.pool.add(source, owned=True)

    def identity(self) -> ModelIdentity:
        """Of the model. Nobody runs it meanwhile."""
        if self._identity is None:
            hold = Hold(locks_of([self._model]))
            take = lambda: (hold.take(), identify(self._model, self._tokenizer))[1]  # noqa: E731
            self._identity = do_and_undo(take, hold.give)
        return self._identity
