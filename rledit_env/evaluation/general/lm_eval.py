"""EleutherAI's lm-eval on the edited LLM (extra ``rledit-env[lm-eval]``)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from rledit_env.lm.editable import EditableLM
from rledit_env.type_aliases import JsonObject


def lm_eval_scores(
    lm: EditableLM,
    tasks: Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of the LLM, at its current weights, on tasks of lm-eval; the model is not copied.

    Args:
        lm: the LLM.
        tasks: their names in lm-eval, such as "hellaswag".
        shots: number of solved examples before each question; None means the task's own number.
        limit: number of examples of a task; None means all.
        batch_size: of lm-eval's forward passes.
        include_path: a folder with more task definitions.

    Returns:
        Task → metric → lm-eval's value (mostly a share of 1).

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: lm-eval does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "tasks of lm-eval need lm-eval; install it with: pip install 'rledit-env[lm-eval]'"
        ) from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"lm-eval knows no task {unknown[0]!r}; 'lm-eval ls tasks' lists them")
    adapter = HFLM(
        pretrained=lm.model, tokenizer=copy.deepcopy(lm.tokenizer), batch_size=batch_size,  # HFLM changes it
        max_length=lm.context_length,
    )  # fmt: skip
    output: JsonObject = simple_evaluate(
        model=adapter, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0,
        log_samples=False,
    )  # fmt: skip
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and "stderr" not in name
        }
        for task, values in output["results"].items()
    }
