"""Maps the three source folders at the root onto one import name, `deepseek_hf`."""

from setuptools import setup

setup(
    packages=["deepseek_hf.configuration", "deepseek_hf.modeling", "deepseek_hf.finetune"],
    package_dir={
        "deepseek_hf.configuration": "configuration",
        "deepseek_hf.modeling": "modeling",
        "deepseek_hf.finetune": "finetune",
    },
    package_data={"deepseek_hf.finetune": ["recipes/*.yaml"]},
)
