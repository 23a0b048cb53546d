"""Save rows by the library datasets, in all forms that are read. Arguments: rows, a directory."""

import json
import sys

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

rows, folder = json.loads(sys.argv[1]), sys.argv[2]
names = sorted({row["label"] for row in rows})
classes = Features({"text": Value("string"), "label": ClassLabel(names=names)})
for name, data in (("texts", Dataset.from_list(rows)), ("classes", Dataset.from_list(rows, features=classes))):
    data.save_to_disk(f"{folder}/{name}", num_shards=2)
    data.select(range(len(rows) - 1, -1, -1)).save_to_disk(f"{folder}/{name}-reversed")
    data.to_parquet(f"{folder}/{name}.parquet")
    DatasetDict({"train": data}).save_to_disk(f"{folder}/{name}-splits")
json.dump({}, sys.stdout)
