"""Views: editable views of one LLM, for editors that edit different modules of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agents.locate_then_edit.locate import LocateAgent
from agents.running.editors import Editor
from rledit_env.lm.editable import EditableLM
from rledit_env.lm.loading.loader import ModelSource
from rledit_env.lm.loading.registry import default_edit_modules


class Views:
    """Editable views of one LLM, which is loaded once. Only one view exists at a time; it starts pre-trained.

    Args:
        model: registry name, hub id or folder.
        dtype, device, revision, trust_remote_code: as for :meth:`EditableLM.load`.
        load: loads the LLM, with the arguments of :meth:`EditableLM.load`, which is the default.
    """

    def __init__(
        self, model: str, dtype: str = "auto", device: str = "auto", revision: str | None = None,
        trust_remote_code: bool = False, load: Callable[..., EditableLM] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.dtype, self.device = model, dtype, device
        self.source: ModelSource = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._load = load or EditableLM.load
        self._view: EditableLM | None = None
        self._patterns: tuple[str, ...] | None = None

    @property
    def loaded(self) -> bool:
        """Whether the LLM has been loaded."""
        return self._view is not None

    def get(self, edit_modules: Sequence[str] | str | None) -> EditableLM:
        """The view with these edited modules (None: the model's default ones), pre-trained and with empty caches."""
        patterns = (edit_modules,) if isinstance(edit_modules, str) else tuple(edit_modules or ()) or None
        self.restore()
        if self._view is None:
            self._view = self._load(self.model, patterns, self.dtype, self.device, **self.source)
        elif patterns != self._patterns:
            model, tokenizer = self._view.model, self._view.tokenizer
            self._view = None  # frees its copies of the weights before the new view makes its own
            modules = patterns or default_edit_modules(self.model, model)
            revision = self.source["revision"]
            self._view = EditableLM(model, tokenizer, modules, self.model, revision=revision, optimize=True)
        self._patterns = patterns
        return self._view

    def of(self, editor: Editor, edit_modules: Sequence[str] | str | None = None) -> EditableLM:
        """The view for an editor, with these edited modules, else those that the editor names, else its method's
        defaults."""
        modules = edit_modules or editor.env.get("edit_modules")
        agent = editor.agent_class()
        if modules is None and issubclass(agent, LocateAgent):
            modules = agent.default_modules(self.get(None))
        return self.get(modules)

    def restore(self) -> None:
        """Restore the pre-trained weights and empty the caches, so that all editors start alike."""
        if self._view is not None:
            self._view.restore()
            self._view.prefix_cache.clear()
            self._view.reference_cache.clear()
