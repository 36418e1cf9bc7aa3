"""Cloud volumes: an instance's home on a volume of its own, which the cloud keeps, limits and takes snapshots of.

`cloud` says what is needed of a cloud, `ec2` has it from AWS. `cloud_volume` makes, attaches, formats and removes a
volume, `cloud_snapshot` takes and removes its snapshots, `devices` finds it on its node, `orphans` removes what no
instance needs.
"""
