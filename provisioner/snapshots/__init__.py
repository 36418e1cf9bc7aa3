"""Snapshots: what is kept of an instance while nothing of it runs.

`manifest` says what a snapshot is, `store` how one is written and read. `directory` keeps them in a directory, `s3` in
a bucket; `location` says which. `sealing` encrypts them, with the keys of a `keyfile`. `capture` takes one, `restore`
gives one back. What they need of a Docker engine is the protocol in `machine`.
"""
