"""Options and settings of the whole suite."""

import os
from collections.abc import Iterator

# Small tensors gain nothing from threads; it must be set before torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is tested is computed, and nothing is left in the user's folder; the tests of the cache say where it is.
os.environ["TNMOE_CACHE"] = "off"

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "tnmoe",
    deadline=None,  # a shared machine makes any time limit a coin toss
    derandomize="CI" in os.environ,  # CI checks the change at hand; new examples are found at the desk
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tnmoe")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from the present emitter")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """True if golden files are to be rewritten instead of compared."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="module")
def any_processor() -> Iterator[None]:
    """Modules of the flavour `fast` call oneDNN on this machine, whatever its processor can do."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        yield
