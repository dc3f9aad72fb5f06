"""Sites on machines of their own, joined by NVIDIA FLARE (the extra `flare`).

Nothing here knows a protocol or a round: FLARE carries bytes between `securefl.runs` at the server
and `securefl.site.Gate` at each site. Nobody's code travels: a job names an experiment, and the
classes that may act for it are two of ours, installed where they run.

    server:  Supervisor -> FLARE's server -> a job's process: RoundController (a whole run)
                        -> Steward: submits interrupted runs again
    site:    Supervisor -> FLARE's client -> a job's process: SiteExecutor (relays bytes)
                        -> service: the Gate, its records and its training, behind a local socket
"""
