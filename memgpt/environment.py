"""Process-wide settings that must be in place before the libraries are imported: no telemetry, no hub noise, threads.

Called first thing by the command line and by the flows; nothing happens at import.
"""

import gc
import logging
import os
import socket
import warnings
from pathlib import Path

from memgpt.errors import UserError

_SETTINGS = {
    # nobody is phoned: each library has its own switch
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # noise in a normal run
    "GIT_PYTHON_REFRESH": "quiet",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # of 7, which are minutes without a word: `tracking.patiently` has patience
    "DATASETS_VERBOSITY": "error",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # a thread that waits sleeps: on cores that are shared, spinning makes training up to eight times slower
    "OMP_WAIT_POLICY": "PASSIVE",
}
# New objects after which Python looks for garbage, instead of 700: the libraries make half a million that stay, and
# looking through them again and again is up to a fifth of a start.
GARBAGE = 10_000
_NOISY = (
    *("alembic", "mlflow", "great_expectations", "httpx", "urllib3", "botocore", "matplotlib"),
    *("torchao", "torch.utils._pytree"),  # transformers imports torchao where it is, which tells what does not suit it
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
    """Where all checkouts of this user meet on this machine; by machine, since homes are shared over networks."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "memgpt" / name / socket.gethostname()


def rank() -> int:
    """Which of torchrun's processes this is; 0, the one that tells, logs and writes, also without torchrun."""
    return int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0


def threads(configured: int | None) -> int:
    """How many threads a stage computes with: the flow's share of the cores (MEMGPT_THREADS), else
    `runtime.threads`, else every core this process may use."""
    share = os.environ.get("MEMGPT_THREADS")
    if share:
        if not share.isdecimal():
            raise UserError(f"MEMGPT_THREADS={share}: not a number of threads")
        return max(1, int(share))
    if configured:
        return configured
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
