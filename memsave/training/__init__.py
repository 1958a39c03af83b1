"""One loop for every task: tasks yield one loss per example, the loop does the rest.

    task           what a task has to offer
    segmentation   brain tumours: the task of `data=phantom` and `data=brats`
    table_to_text  sentences from tables: the task of `data=visits` and `data=e2e`
    loop           the loop: logical batches, micro-batches, schedule, evaluation, checkpoints
    measure        what each memory mode keeps, on one batch
    checkpoint     safetensors and JSON, written whole or not at all
    result         what a run leaves behind
    overlay        the segmentation as a picture

`experiment` puts them together, from a config to the folder of a run.
"""
