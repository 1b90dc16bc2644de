"""From a plain transformer to a Kimi Linear model, without training: `kimi-rl convert`.

    source (kimi_rl.model.source) → attention.py → kda.py | mla.py → folder in Hugging Face layout
                                        ↑ calibration.py: texts, least squares      report.py: what it cost

`conversion.py` walks through the layers.
"""
