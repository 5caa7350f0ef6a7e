"""Lets torchvision be imported where its compiled operators do not load (PyPI's wheel beside a +cpu torch).

It declares fakes for two operators without asking whether they exist; Python imports this file when the folder is on
PYTHONPATH.
"""

import torch

for _schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
    if not hasattr(torch.ops.torchvision, _schema.split("(")[0]):
        torch.library.define(f"torchvision::{_schema.split('(')[0]}", _schema[_schema.index("("):])
