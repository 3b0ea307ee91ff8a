"""Process-wide settings that must be in place before libraries are imported: no telemetry, few messages, threads.

The command line and the flows call `prepare` first; importing this module changes nothing.
"""

import gc
import logging
import os
import socket
import warnings
from pathlib import Path

from memgpt.errors import UserError

_SETTINGS = {
    # no telemetry: each library has its own switch
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # no messages that a normal run does not need
    "GIT_PYTHON_REFRESH": "quiet",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default 7 take minutes in silence; `tracking.patiently` retries
    "DATASETS_VERBOSITY": "error",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # waiting threads sleep: on shared cores, spinning makes training up to eight times slower
    "OMP_WAIT_POLICY": "PASSIVE",
}
# New objects that trigger Python's garbage collection, instead of 700. The libraries create half a million objects that
# stay; scanning them again and again takes up to a fifth of the start-up time.
GARBAGE = 10_000
_NOISY = (
    *("alembic", "mlflow", "great_expectations", "httpx", "urllib3", "botocore", "matplotlib"),
    *("torchao", "torch.utils._pytree"),  # transformers imports torchao if installed; it logs what is incompatible
)


def prepare() -> None:
    """Set every switch that the user has not set; `MEMGPT_DEBUG=1` leaves warnings visible."""
    gc.set_threshold(GARBAGE)
    debug = os.environ.get("MEMGPT_DEBUG") == "1"
    for name, value in _SETTINGS.items():
        if not (debug and name.endswith(("WARNINGS", "VERBOSITY", "LEVEL"))):
            os.environ.setdefault(name, value)
    if not debug:
        warnings.filterwarnings("ignore")
        for noisy in _NOISY:
            logging.getLogger(noisy).setLevel(logging.ERROR)


def shared_folder(name: str) -> Path:
    """A folder shared by all checkouts of this user on this machine; per machine, since homes may be on a network."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "memgpt" / name / socket.gethostname()


def rank() -> int:
    """Rank of this torchrun process, 0 without torchrun. Rank 0 prints, logs and writes."""
    return int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0


def threads(configured: int | None) -> int:
    """Number of threads of a stage: the flow's share of the cores (MEMGPT_THREADS), else `runtime.threads`, else every
    core that this process may use."""
    share = os.environ.get("MEMGPT_THREADS")
    if share:
        if not share.isdecimal():
            raise UserError(f"MEMGPT_THREADS={share}: not a number of threads")
        return max(1, int(share))
    if configured:
        return configured
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
