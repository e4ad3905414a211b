"""Other stacks' released packages, imported as they are, with only their transport left out.

verl and TRL are installed without their dependencies. What their modules import for moving data (ray, tensordict,
codetiming, orjson, pandas, datasets) is replaced, while they load and only where it is not installed, by modules whose
names resolve to placeholders; calling one fails. No formula under test touches them.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import textwrap
import types
from contextlib import contextmanager

TRANSPORT = ("ray", "tensordict", "codetiming", "orjson", "pandas", "datasets")


class _Placeholder:
    """Usable in annotations, as a base class and as a decorator; nothing more."""

    def __init_subclass__(cls):
        super().__init_subclass__()

    def __class_getitem__(cls, item):
        return cls


class _Lower:
    """In the place of a function, a decorator or a submodule."""

    def __init__(self, name):
        self._name = name

    def __call__(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and callable(args[0]):
            return args[0]
        raise RuntimeError(f"{self._name} was called: the test needs the real package")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(name)


def _placeholder(name):
    return _Lower(name) if name[:1].islower() else type(name, (_Placeholder,), {})


class _Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        inside = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if inside else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


@contextmanager
def without_transport(others=()):
    """Imports inside see placeholders for absent transport packages, and for others; afterwards they are unknown again."""
    absent = {name for name in (*TRANSPORT, *others) if importlib.util.find_spec(name) is None}
    finder = _Finder(absent)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.partition(".")[0] in absent]:
            del sys.modules[name]


def statement(function, marker, occurrence=0):
    """The `occurrence`-th if-statement of `function` whose test contains `marker`, compiled: run the released lines."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.If) and marker in ast.unparse(n.test)]
    found.sort(key=lambda n: n.lineno)
    return compile(ast.Module([found[occurrence]], []), f"<{function.__qualname__}>", "exec")
