"""Nothing is believed at first sight."""

from __future__ import annotations

from provisioner.repair import Sightings


def test_a_thing_is_told_from_its_second_sighting_in_a_row_on() -> None:
    sightings = Sightings()
    assert sightings.see(["a", "b"]) == []
    assert sightings.see(["a", "c"]) == ["a"]
    assert sightings.see(["a", "b"]) == ["a"]
    assert sightings.see(["b", "c"]) == ["b"]


def test_the_same_instance_in_another_generation_is_another_thing() -> None:
    sightings = Sightings()
    sightings.see([("mu-a", 1)])
    assert sightings.see([("mu-a", 2)]) == []
