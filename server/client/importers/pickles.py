"""A reader of pickles that takes tensors and containers only.

A pickle is a program for a small stack machine, and Python's own reader runs whatever it calls. This one interprets
the few opcodes that ``torch.save`` writes for tensors, lists and dictionaries, and refuses every other opcode and
every other name. Nothing is imported and nothing is called. ``pickletools`` of the standard library splits the bytes
into opcodes; it executes nothing.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_PICKLE_BYTES = 16 * 1024 * 1024
MAX_OPCODES = 1_000_000

_MARK = object()

PersistentLoad = Callable[[object], object]
"""Returns the object of a persistent id, such as a storage."""


class PickleRefusedError(ValueError):
    """A pickle holds something else than tensors and containers, or is damaged."""


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A name that a pickle refers to, such as ``torch.FloatStorage``. It is not imported."""

    name: str


@dataclass(slots=True)
class _ParameterList:
    """``torch.nn.ParameterList`` before its state is read."""

    items: list[object] = field(default_factory=list)


def load(
    data: bytes,
    builders: Mapping[str, Callable[..., object]],
    classes: Collection[str],
    persistent_load: PersistentLoad,
) -> object:
    """Interpret a pickle.

    Args:
        data: The pickle.
        builders: What to do for each function that a pickle may call, by its full name. Nothing else is called.
        classes: Full names that a pickle may refer to without a call; they become a ``GlobalName``.
        persistent_load: Finds the objects that are stored outside the pickle.

    Returns:
        Plain values, and what the builders return. A ``torch.nn.ParameterList`` becomes a list.

    Raises:
        PickleRefusedError: If the pickle is damaged, too large, or holds anything that is not expected.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise PickleRefusedError(f"the pickle has {len(data)} bytes; at most {MAX_PICKLE_BYTES} are read")
    machine = _Machine(builders, classes, persistent_load)
    try:
        # An escape that is not valid is a warning in pickletools.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return _interpreted(data, machine)
    except PickleRefusedError:
        raise
    except _DAMAGES as error:
        raise PickleRefusedError(f"the pickle is damaged ({type(error).__name__}: {error})") from error


_DAMAGES = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
    Warning,
)
"""What a damaged pickle raises in ``pickletools`` or in the steps."""


def _interpreted(data: bytes, machine: _Machine) -> object:
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number >= MAX_OPCODES:
            raise PickleRefusedError(f"the pickle has more than {MAX_OPCODES} opcodes")
        if opcode.name == "STOP":
            return _plain(machine.result())
        step = _STEPS.get(opcode.name)
        if step is None:
            raise PickleRefusedError(f"the pickle uses the opcode {opcode.name}, which tensors do not need")
        step(machine, argument)
    raise PickleRefusedError("the pickle is damaged: it has no end")


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(
        self,
        builders: Mapping[str, Callable[..., object]],
        classes: Collection[str],
        persistent_load: PersistentLoad,
    ) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, object] = {}
        self._builders = builders
        self._names = {*builders, *classes, _PARAMETER_LIST}
        self._persistent_load = persistent_load

    def result(self) -> object:
        if len(self.stack) != 1:
            raise PickleRefusedError("the pickle is damaged: its stack is not empty at the end")
        return self.stack[0]

    def pop_mark(self) -> list[Any]:
        """Remove and return what lies above the topmost mark, and remove the mark."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise PickleRefusedError("the pickle is damaged: a mark is missing")

    def push_name(self, name: str) -> None:
        if name not in self._names:
            raise PickleRefusedError(f"the pickle refers to {name[:100]!r}, which tensors do not need")
        self.stack.append(GlobalName(name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleRefusedError("the pickle is damaged: a name is not a string")
        self.push_name(f"{module}.{name}")

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, GlobalName) or not isinstance(arguments, tuple):
            raise PickleRefusedError("the pickle calls something that is not a known function")
        build = self._builders.get(function.name)
        if build is None:
            raise PickleRefusedError(f"the pickle calls {function.name}, which tensors do not need")
        self.stack.append(build(*arguments))

    def new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind != GlobalName(_PARAMETER_LIST) or arguments != ():
            raise PickleRefusedError("the pickle makes an object that is not a list of parameters")
        self.stack.append(_ParameterList())

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(state, tuple) and len(state) == 2 and state[1] is None:
            state = state[0]
        if not isinstance(target, _ParameterList) or not isinstance(state, dict):
            raise PickleRefusedError("the pickle sets the state of an object that is not a list of parameters")
        parameters = state.get("_parameters")
        if not isinstance(parameters, dict) or sorted(parameters, key=int) != [*map(str, range(len(parameters)))]:
            raise PickleRefusedError("the pickle holds a list of parameters that is not numbered from 0")
        target.items = [parameters[str(index)] for index in range(len(parameters))]

    def load_persistent(self) -> None:
        self.stack.append(self._persistent_load(self.stack.pop()))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise PickleRefusedError("the pickle appends to something that is not a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleRefusedError("the pickle sets items of something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise PickleRefusedError("the pickle has a key that is neither a string nor an integer")
            target[key] = value


_PARAMETER_LIST = "torch.nn.modules.container.ParameterList"

_Step = Callable[[_Machine, Any], object]


def _pop_tuple(count: int) -> _Step:
    def step(machine: _Machine, _: object) -> None:
        items = tuple(machine.stack[len(machine.stack) - count :])
        if len(items) != count or any(item is _MARK for item in items):
            raise PickleRefusedError("the pickle is damaged: its stack is too short")
        del machine.stack[len(machine.stack) - count :]
        machine.stack.append(items)

    return step


def _constant(make: Callable[[], object]) -> _Step:
    return lambda machine, _: machine.stack.append(make())


def _push(machine: _Machine, argument: object) -> None:
    machine.stack.append(argument)


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _append_one(machine: _Machine, _: object) -> None:
    machine.append([machine.stack.pop()])


def _set_one(machine: _Machine, _: object) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


_LITERALS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")

_STEPS: Mapping[str, _Step] = {
    **dict.fromkeys(_LITERALS, _push),
    **dict.fromkeys(("PROTO", "FRAME"), lambda _machine, _argument: None),
    "MARK": _constant(lambda: _MARK),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "TUPLE1": _pop_tuple(1),
    "TUPLE2": _pop_tuple(2),
    "TUPLE3": _pop_tuple(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_mark())),
    "APPEND": _append_one,
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "SETITEM": _set_one,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.stack.append(machine.memo[index])),
    # pickletools separates module and name of GLOBAL by a space.
    "GLOBAL": lambda machine, argument: machine.push_name(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.stack_global(),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.new_object(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.load_persistent(),
}


def _plain(value: object) -> object:
    """Replace parameter lists at the top level and in its containers by lists."""
    if isinstance(value, _ParameterList):
        return value.items
    if isinstance(value, dict):
        return {key: _plain(item) if isinstance(item, _ParameterList) else item for key, item in value.items()}
    return value
