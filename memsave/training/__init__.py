"""Training: one loop for all tasks.

    task         the protocol of a task: one loss per example, never a mean
    loop         the loop: logical batches, micro-batches, optimizer, learning rate
    private      clipping, noise and the privacy statement of a run
    spending     what several runs on the same data spend together
    ledger       the list of private runs on each data set, in the cache
    ema          moving average of the weights
    measure      memory and time of each memory mode, on one batch
    monitor      memory of the training steps, compared with the budget
    process      memory of the process
    checkpoint   checkpoints as safetensors and JSON, written atomically
    signals      stopping between two steps
    log, result, run_folder   the files of a run

`memsave.experiment` combines them.
"""
