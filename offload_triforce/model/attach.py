"""Which attention a model runs with: ours in a thread that is at work on it, its own in all others.

transformers asks a model's configuration for the name of its attention, when it builds masks and in each layer. Setting
another name there for the time of a step would change the model for everybody: ``generate`` in another thread would
build no mask in one moment, and attend without one in the next. So nothing is set. Instead the question is answered by
thread: with our name in one that has attached the configuration's model, and as ever in all others. What is not changed
need not be put back, whatever interrupts us.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from offload_triforce.errors import UnsupportedModelError
from offload_triforce.model.lock import Hold, do_and_undo, locks_of

T = TypeVar("T")

ATTENTION_NAME = "offload_triforce"
_QUESTION = "_attn_implementation"  # a property of configurations


class _Here(threading.local):
    """The attention that this thread has attached to models, by the identity of their configurations."""

    names: ClassVar[Mapping[int, str]] = {}


_here = _Here()
_answering: set[type] = set()  # classes whose property is ours
_changing = threading.RLock()


class Attachment:
    """Some models, ready to be run by one thread at a time, with our attention."""

    def __init__(self, *models: PreTrainedModel | None, name: str = ATTENTION_NAME) -> None:
        """``models``: the same one may come twice, and None is nobody. ``name``: of the attention, as registered.

        Raises:
            UnsupportedModelError: a version of transformers that finds its attention in another way.
        """
        present = [model for model in models if model is not None]
        self.locks, self.name = locks_of(present), name
        self.configs = [config for model in present for config in _configs_of(model)]  # kept: their ids are
        for kind in {type(config) for config in self.configs}:
            _answer_by_thread(kind)

    def call(self, work: Callable[[], T], wait: bool = True, cancelled: Callable[[], bool] = lambda: False) -> T | None:
        """``work()``, with the models locked and our attention attached; None if ``cancelled`` before it began.

        Raises:
            BusyError: a model is in use, and there is to be no waiting.
        """
        stay = _Stay(self)
        return do_and_undo(lambda: work() if stay.begin(wait, cancelled) else None, stay.end)


class _Stay:
    """One use of an attachment by one thread."""

    def __init__(self, attachment: Attachment) -> None:
        self._hold, self._before = Hold(attachment.locks), _here.names
        self._names = dict.fromkeys(map(id, attachment.configs), attachment.name)
        self._grad = torch.is_grad_enabled()

    def begin(self, wait: bool = True, cancelled: Callable[[], bool] = lambda: False) -> bool:
        if not self._hold.take(wait, cancelled):
            return False
        _here.names = {**self._before, **self._names}
        return True

    def end(self) -> None:
        """As often as one likes."""
        _here.names = self._before
        torch.set_grad_enabled(self._grad)  # an interruption may have kept torch's own context from ending
        self._hold.give()


@contextmanager
def attached(*models: PreTrainedModel | None) -> Iterator[None]:
    """The same around a block. For scripts and tests: a Ctrl-C may fall between the block's end and this one's."""
    stay = _Stay(Attachment(*models))
    try:
        stay.begin()
        yield
    finally:
        stay.end()


def _configs_of(model: PreTrainedModel) -> list[PretrainedConfig]:
    """All configurations that some part of a model may look into."""
    found: dict[int, PretrainedConfig] = {}
    left = [value for module in model.modules() for value in vars(module).values()]
    while left:
        config = left.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            left.extend(getattr(config, name, None) for name in config.sub_configs)
    return list(found.values())


def _answer_by_thread(kind: type) -> None:
    """Let configurations of this kind answer by thread; where a subclass has its own property, that one as well."""
    with _changing:
        if kind in _answering:
            return
        owners = [base for base in kind.__mro__ if isinstance(vars(base).get(_QUESTION), property)]
        if not owners:
            raise UnsupportedModelError(
                f"{kind.__name__} has no {_QUESTION} to be asked: this version of transformers is not supported"
            )
        for owner in set(owners) - _answering:
            setattr(owner, _QUESTION, _by_thread(vars(owner)[_QUESTION]))
        _answering.update(owners, [kind])


def _by_thread(own: property) -> property:
    def name(config: PretrainedConfig) -> str | None:
        return _here.names.get(id(config)) or own.fget(config)

    return property(name, own.fset, own.fdel, own.__doc__)
