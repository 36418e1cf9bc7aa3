"""Everything that talks to a Docker engine: the only package that imports `docker`.

One module a noun. Each function takes the `DockerHost` it works on, and every exception of docker-py or requests leaves
this package as one of `provisioner.errors`.
"""
