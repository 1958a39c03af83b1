"""Overrides of experiments so small that a run takes seconds."""

TINY_UNET = [
    "experiment=brats_rev",
    "data.cases=4",
    "data.size=[32,32,24]",
    "data.crop_size=[16,16,16]",
    "model.channels=[8,16]",
    "model.blocks=[1,1]",
    "model.expansion=2",
    "memory.chunks=2",
]

TINY_GPT2 = [
    "model.layers=2",
    "model.heads=2",
    "model.width=16",
    "model.vocabulary=400",
    "model.positions=200",
    "model.records=40",
    "model.steps=2",
    "model.batch_size=4",
    "data.records=40",
    "data.held_out=4",
    "task.generate=2",
    "task.beams=2",
    "data.max_length=60",
    "trainer.steps=3",
    "trainer.batch_size=8",
    "trainer.micro_batch_size=5",
]
"""Sizes for the experiment gpt2_dp, without its name."""

TINY_GPT2_DP = ["experiment=gpt2_dp", *TINY_GPT2]

TINY_ROBERTA = [
    "model.layers=2",
    "model.heads=2",
    "model.width=16",
    "model.vocabulary=700",
    "model.positions=60",
    "model.texts=300",
    "model.steps=2",
    "model.batch_size=4",
    "data.comments=40",
    "data.held_out=10",
    "data.max_length=50",
    "trainer.steps=2",
    "trainer.batch_size=8",
    "trainer.micro_batch_size=5",
    "profiler.compare=[]",
]
"""Sizes for the experiment roberta_dp, without its name."""
