"""A Trainer of transformers, trained in a federation: the last two lines are all that is added.

python examples/trainer.py MODEL FILE.csv    (columns text, label and author; a client for each author)
"""

import sys

import datasets
import transformers

import fedlora

folder, file = sys.argv[1:]
rows = datasets.load_dataset("csv", data_files=file, split="train").class_encode_column("label")
names = rows.features["label"].names
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
transformers.set_seed(0)  # the new classifier starts alike when the script runs again to resume
model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), remove_columns="text")


def accuracy(found):
    return {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()}


trainer = transformers.Trainer(
    model=model,
    args=transformers.TrainingArguments(
        learning_rate=5e-4,
        per_device_train_batch_size=8,
        num_train_epochs=3,
        lr_scheduler_type="cosine",
        metric_for_best_model="accuracy",
    ),
    train_dataset=rows,
    processing_class=tokenizer,
    compute_metrics=accuracy,
)

experiment = fedlora.from_trainer(trainer, clients="author")
result = fedlora.run(experiment, "runs/trainer")

print(f"accuracy {result.before['accuracy']:.3f} -> {result.after['accuracy']:.3f}   {result.adapter}")
