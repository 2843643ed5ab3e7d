"""Checkpoints, from bytes on disk to models.

- `files`: a checkpoint file is whole or not there, and verified by its hashes; the folder that keeps a run's.
- `sharded`: checkpoints of which every process writes a part, and reading them by any number of processes.
- `format`: what gptpl puts into a checkpoint, and reading it back from files that anybody may have made.
- `resume_state`: random states, position and loop counters, from which a run resumes to the same bits.
- `loading`: model and tokenizer from a checkpoint, or from another program's files; a run to start from.
- `adapter`: a LoRA run's matrices without their base, and the two added again.
"""
