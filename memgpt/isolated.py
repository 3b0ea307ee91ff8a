"""One registered version in its own process: `python -I isolated.py models:/memgpt-ner/3 FOLDER`, for gate.Version. Its
files are downloaded to FOLDER; in the folder that MLflow would choose they would stay for ever.

It runs as a file, isolated (-I), so that nothing of the checkout is imported first: the code of two versions in one
process would mix silently, and an imported checkout would override both. Standard library and MLflow only.

Input and output are JSON lines. The first output reports that the model loaded: {"bytes": size of its weights}.
{"do": "predict", "inputs": PATH, "params": {}|null, "out": PATH} is answered by {"rows": n}. {"do": "time", "rows": n}
predicts the first n of these again; the answer is {"seconds": s}. {"error": "..."} instead ends the process.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main(uri: str, folder: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the gate, not even mid-prediction
    gc.set_threshold(10_000)  # as in memgpt/environment.py, which cannot be imported here
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the model's libraries print goes to the log, not between the answers

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")

    try:
        import mlflow.pyfunc

        model = mlflow.pyfunc.load_model(uri, dst_path=folder)
        home = packaged_home()
        answer({"bytes": sum(file.stat().st_size for file in home.rglob("*.safetensors"))})
        inputs: list[Any] = []
        params: dict[str, Any] | None = None
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "predict":
                inputs = json.loads(Path(command["inputs"]).read_text(encoding="utf-8"))
                params = command["params"]
                predictions = model.predict(inputs, params=params)
                Path(command["out"]).write_text(json.dumps(predictions), encoding="utf-8")
                answer({"rows": len(predictions)})
            else:
                start = time.perf_counter()
                model.predict(inputs[: command["rows"]], params=params)
                answer({"seconds": time.perf_counter() - start})
    except Exception as error:  # whatever fails in a version is its answer, with the stack trace in the log
        import traceback

        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:500]})


def packaged_home() -> Path:
    """The model's own directory, which must contain the imported code."""
    memgpt = sys.modules.get("memgpt")
    home = Path(str(memgpt.__file__)).resolve().parents[2] if memgpt else None  # HOME/code/memgpt/__init__.py
    if home is None or not (home / "MLmodel").is_file():
        raise ImportError(f"predicts with code that is not packaged with it ({home or 'none imported'})")
    return home


if __name__ == "__main__":
    main(*sys.argv[1:])
