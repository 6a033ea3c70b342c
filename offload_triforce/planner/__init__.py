"""Will it fit, and how fast will it be: answered from a configuration alone, by the rules that the runtime follows."""
