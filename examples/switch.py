"""Why does the IoU drop when the second stage begins? The first steps of several second stages from the same weights.

The weights are those of the first stage that evidence.py keeps. Writes examples/results/switch.csv.
"""

import copy
import csv

import torch
from evidence import (
    RESULTS,
    SWEEP_SEED,
    best_rate,
    first_stage,
    initial_network,
    make_loss,
    read,
    task_data,
    tried_rates,
)
from evidence import TASKS as EVIDENCE_TASKS
from segment import Stage, evaluate

TASK = "looped digits"
SEEN = (5, 10, 20, 40)


def main() -> None:
    """Begin a second stage with each loss, at each rate, with the rate rising from nearly 0 or full from the start."""
    torch.set_num_threads(1)
    task, data = EVIDENCE_TASKS[TASK], task_data(TASK, SWEEP_SEED)
    model = initial_network(task, SWEEP_SEED)
    first_stage(
        model, TASK, SWEEP_SEED, best_rate(tried_rates(read(RESULTS / "sweep.jsonl"))[TASK, "ce"]), data["train"]
    )
    before = evaluate(model, data["validation"], task).score
    records = []
    for loss in ("ce", "lovasz-batch"):
        for rate in (1e-3, 3e-3, 1e-2):
            for warm_up in (True, False):
                trained = copy.deepcopy(model)
                stage = Stage(
                    trained, data["train"], make_loss(task, loss), steps=300, lr=rate, batch_size=4, seed=SWEEP_SEED
                )
                record = {"loss": loss, "rate": rate, "warm_up": warm_up, "step 0": before}
                for step in range(1, SEEN[-1] + 1):
                    if not warm_up:
                        stage.optimizer.param_groups[0]["lr"] = rate
                    stage.step()
                    if step in SEEN:
                        record[f"step {step}"] = evaluate(trained, data["validation"], task).score
                print(record, flush=True)
                records.append(record)
    with (RESULTS / "switch.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


if __name__ == "__main__":
    main()
