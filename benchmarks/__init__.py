"""Speed and memory of the product, beside peers and ceilings that are measured in the same run."""

# {benchmark: {variant: the one that it is compared with}}; the first two are measured by default
VARIANTS = {"train": {"compiled": "diffusers, compiled", "diffusers, compiled": "",
                      "eager": "diffusers, eager", "diffusers, eager": ""},
            "sample": {"product": "diffusers, compiled", "diffusers, compiled": "",
                       "product, compiled": "diffusers, compiled",
                       "product, plain": "diffusers, eager", "diffusers, eager": ""},
            "encode": {"product, compiled": "peers, compiled", "peers, compiled": "",
                       "product, eager": "peers, eager", "peers, eager": ""}}
# {part of the engine: the benchmarks that it is for}
PARTS = {"noise": ("train", "sample"), "norm": ("train", "sample", "encode"),
         "geglu": ("train", "sample"), "conv": ("train", "sample", "encode"), "unet": ("sample",)}
