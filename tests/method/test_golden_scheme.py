"""The fixtures' own check: our drawing of weights and inputs is theirs."""

import zlib

import golden
import numpy as np


def test_weights_and_inputs_are_drawn_as_the_fixtures_say():
    check, _ = golden.case("scheme_check")
    for row in check["weights"]:
        w = golden.weight(row["name"], row["shape"]).numpy()
        assert zlib.crc32(w.tobytes()) == row["crc32_of_float32_bytes"], row["name"]
    for row in check["inputs"]:
        x = golden.network_input(row["name"], row["shape"], row["tanh"]).numpy()
        np.testing.assert_allclose(x.ravel()[:5], row["first_values"], rtol=1e-6,
                                   err_msg=row["name"])
