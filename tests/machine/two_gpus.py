"""Answers of the scripted driver library for a machine with two GPUs."""

TWO = {
    "count": 2,
    "0.uuid": "GPU-aaaa1111-0000-0000-0000-000000000000",
    "0.name": "First",
    "1.uuid": "GPU-aaaa2222-0000-0000-0000-000000000000",
    "1.name": "Second",
}
MIG = TWO | {"1.mig": 1, "2.parent": 1, "2.uuid": "MIG-bbbb", "2.name": "Second MIG 1g.10gb", "2.total": 10 << 30}
"""The second GPU has a MIG instance."""
