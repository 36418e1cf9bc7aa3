"""The `docker` package of Pulumi, served by us.

The types, inputs, outputs, ids and defaults are those of the official plugin (`pulumi_docker` 5.2), so that a stack can
go from one to the other without a change; only the inputs that this project uses are taken.
"""
