"""Names in pickles that no user can allow: whatever runs, loads, compiles or imports."""

from __future__ import annotations

import pytest

from converter.core.formats.pickle_names import allowing_names, runs_code

RUN = [
    "os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "builtins.getattr",
    "__builtin__.exec",
    "sys.modules", "importlib.import_module", "ctypes.CDLL", "runpy.run_path", "pickle.loads", "_pickle.Unpickler",
    "cPickle.loads", "dill.loads", "joblib.load", "marshal.loads", "operator.attrgetter", "functools.partial",
    "types.FunctionType", "types.CodeType", "torch.load", "torch.save", "torch.compile", "torch.hub.load",
    "torch.jit.load", "torch.jit._serialization.load", "torch.package.PackageImporter", "torch.fx.GraphModule",
    "torch.utils.cpp_extension.load_inline", "torch.distributed.rpc.rpc_sync", "torch._inductor.codecache.compile",
    "numpy.load", "numpy.memmap", "numpy.f2py.compile", "yaml.unsafe_load", "code.InteractiveInterpreter",
    "webbrowser.open", "pip.main", "socket.socket", "multiprocessing.Process", "huggingface_hub.hf_hub_download",
    "converter.cli.main",
]  # fmt: skip
HARMLESS = [
    "torch.FloatStorage", "torch._utils._rebuild_tensor_v2", "torch.Size", "torch.loader.Thing",
    "collections.OrderedDict",
    "mytrainer.os.system_state", "osprey.Config", "codecs2.Thing", "iox.Thing", "types2.FunctionType",
    "transformers.trainer_utils.SchedulerType",
]  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_a_name_that_runs_code_is_not_allowed_by_any_pattern(name: str) -> None:
    assert runs_code(name)
    with allowing_names([name.replace(".", r"\.")[:-1] + r"\w"] if not _is_canary(name) else ["x"]) as allowed:
        assert not allowed.allows(name)
    assert allowed.used == set()


def _is_canary(name: str) -> bool:
    """Names that a pattern may not even match."""
    return name in ("os.system", "posix.system", "builtins.eval", "subprocess.Popen")


@pytest.mark.parametrize("name", HARMLESS)
def test_a_name_that_only_looks_like_one_can_be_allowed(name: str) -> None:
    assert not runs_code(name)
    with allowing_names([name.replace(".", r"\.")]) as allowed:
        assert allowed.allows(name)
    assert allowed.used == {name}
