"""Variables by which a process learns that its training is followed. Read by the hook as well, which knows them by
themselves because it imports nothing until there is a training."""

ENV_FOLLOWER = "LORAMETER_FOLLOWER"
"""Names what follows the first training of the process: `package.module:callable`."""
DEFAULT_FOLLOWER = "lorameter.attach.writer:Writer"
"""Writes a run."""
AFTER_IMPORT = "LORAMETER_AFTER_IMPORT"
"""What to call when a module has been imported: `module=package.module:function`, several with commas between."""
SEEN = "LORAMETER_SEEN"
"""A file that the hook makes when an interpreter has loaded it; it holds what an interpreter lacks to be measured."""
RUN = "LORAMETER_RUN"
"""The directory of the run that the first training of the command is written to."""
REQUIRE = "LORAMETER_REQUIRE"
"""JSON of the paths of kernels_check that a step must have."""
UNSEEN_END = "ended_unseen"
"""Of the values of a record: nobody saw the training end, and its process has ended."""
COMMAND = "LORAMETER_COMMAND"
"""The command as it was typed; a longer one than `LONGEST_BYTES` stands beside the run
(`lorameter.attach.marker_files`)."""
LONGEST_BYTES = 1 << 16
"""Linux takes 128 KiB of a variable, and 16 times as much of all words and variables of a command."""
