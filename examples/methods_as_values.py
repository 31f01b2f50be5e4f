"""Three methods on one federation, from Python; the last one is put together here.

python examples/methods_as_values.py [ROUNDS]
"""

import dataclasses
import sys

import fedlora
from fedlora.methods.defaults import ADAPTIVE

rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10

# A method is a value: a tuple of phases, each a recipe and a number of rounds.
methods = {
    "lora": fedlora.dense_lora(rounds=rounds),
    "flasc": fedlora.flasc(rounds=rounds),
    # FeDeRA's start over FLASC's links: the difference from the start is thinned, not the factors
    "both": (
        fedlora.Phase(
            recipe=fedlora.Recipe(
                tuning=fedlora.LoRA(rank=16, init=fedlora.SvdOfWeight()),
                down=fedlora.Link(sparsify=fedlora.TopK(density=0.25, quota=fedlora.Quota(head=1)), reference="init"),
                up=fedlora.Link(sparsify=fedlora.TopK(density=0.25, quota=fedlora.Quota(head=1))),
                server=ADAPTIVE,
                memory="init",
            ),
            rounds=rounds,
        ),
    ),
}

shared = fedlora.Experiment(
    data=fedlora.Docstrings(num_classes=4),
    task=fedlora.TextClassification(max_length=64),
    clients=fedlora.Clients(num=40, per_round=4, partition=fedlora.Dirichlet(scheme="flasc", alpha=1.0)),
)
data = fedlora.prepare(shared)  # read, tokenise and deal once, for all three

for label, phases in methods.items():
    experiment = dataclasses.replace(shared, label=label, phases=phases)
    result = fedlora.run(experiment, f"runs/values-{label}-{rounds}", data=data)
    down, up = sum(result.down_bytes.values()), sum(result.up_bytes.values())
    print(
        f"{label:6}  accuracy {result.before['accuracy']:.3f} -> {result.after['accuracy']:.3f}"
        f"   down {down / 1e6:6.2f} MB   up {up / 1e6:6.2f} MB   {result.adapter}",
        flush=True,
    )

trained = fedlora.load_run(result.folder)
print(list(trained.predict(["A coroutine that waits for a future."])[0].items())[:2])
