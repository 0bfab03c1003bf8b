"""exact() switches everything off, agrees with the legacy flags, and leaves no trace; also after an error."""

import contextlib

import pytest
import torch

from lipcert.numerics import _PRECISIONS, exact


def _state():
    def legacy(read):
        try:
            return read()
        except RuntimeError as error:
            return type(error)

    return {
        "precisions": [torch._C._get_fp32_precision_getter(*key) for key in _PRECISIONS],
        "cudnn": legacy(lambda: torch.backends.cudnn.allow_tf32),
        "cublas": legacy(lambda: torch.backends.cuda.matmul.allow_tf32),
        "matmul": legacy(torch.get_float32_matmul_precision),
        "flags": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "deterministic": torch.get_deterministic_debug_mode(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def _generic(value):
    torch._C._set_fp32_precision_setter("generic", "all", value)


SETTINGS = {
    "default": lambda: None,
    "legacy cudnn off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "legacy matmul on": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "legacy matmul medium": lambda: torch.set_float32_matmul_precision("medium"),
    "new matmul on": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "new everything off": lambda: _generic("ieee"),
    "new conv off": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "new everything on": lambda: _generic("tf32"),
    "deterministic already": lambda: torch.use_deterministic_algorithms(True),
    "benchmark on": lambda: setattr(torch.backends.cudnn, "benchmark", True),
}


@pytest.fixture
def restored():
    """Put the process back into PyTorch's defaults after a test that changed them."""
    yield
    _generic("none")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", SETTINGS)
def test_everything_is_off_inside_and_back_outside(setting, restored):
    SETTINGS[setting]()
    before = _state()
    with pytest.raises(ZeroDivisionError), exact() as facts:
        inside = _state()
        assert dict(facts) == {"tf32": False, "autocast": False, "cudnn": False, "deterministic": True, "grad": False}
        assert set(inside["precisions"]) == {"ieee"}
        assert inside["flags"] == (False, False, True)
        assert not inside["fill"]
        raise ZeroDivisionError
    assert _state() == before


@pytest.mark.parametrize("setting", SETTINGS)
def test_legacy_flags_can_be_read_inside(setting, restored):
    SETTINGS[setting]()
    with exact(), torch.backends.cudnn.flags(enabled=False):  # which reads and sets them
        pass
    with exact():
        assert torch.backends.cudnn.allow_tf32 is False
        assert torch.backends.cuda.matmul.allow_tf32 is False
        assert torch.get_float32_matmul_precision() == "highest"


def test_autocast_of_the_caller_does_not_reach_inside():
    x = torch.full((1, 1), 1 + 2.0**-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with exact():
            product = x @ x
    assert product.dtype == torch.float32
    assert product.item() == (1 + 2.0**-12) ** 2 - 2.0**-24  # rounded to float32, not to bfloat16


def test_nesting_and_silence():
    with exact(), exact() as facts, contextlib.nullcontext():
        torch.zeros(3).index_add_(0, torch.tensor([0, 0]), torch.ones(2))  # would warn if warnings were on
        assert facts["deterministic"]
