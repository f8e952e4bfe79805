"""`saml bench --tune`: the devices that it refuses."""

from command_line import assert_refused, saml


def test_a_device_of_no_kind_is_one_line():
    for name in ("gpu", "cuda:x"):
        assert_refused(saml("bench", "--tune", "--device", name), f"--device {name}", "pass cuda")
