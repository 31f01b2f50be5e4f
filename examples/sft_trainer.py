"""TRL's SFTTrainer, trained in a federation: the last two lines are all that is added. Needs `pip install trl`.

python examples/sft_trainer.py MODEL FILE.jsonl    (columns prompt and completion)
"""

import sys

import datasets
import peft
import trl

import fedlora

folder, file = sys.argv[1:]
rows = datasets.load_dataset("json", data_files=file, split="train").train_test_split(0.1, seed=0)

trainer = trl.SFTTrainer(
    model=folder,
    args=trl.SFTConfig(
        learning_rate=2e-4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        max_length=256,
        bf16=False,
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
    peft_config=peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
)

experiment = fedlora.from_trainer(trainer, clients=20)
result = fedlora.run(experiment, "runs/sft")

print(f"loss {result.before['loss']:.3f} -> {result.after['loss']:.3f}   {result.adapter}")
