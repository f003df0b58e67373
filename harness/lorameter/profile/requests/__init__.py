"""Where the time of a request goes: prefill and decode, unmerged and merged, and a cold start."""
