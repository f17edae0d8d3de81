"""Writing a model in the layouts of other programs: transformers', original LLaVA's and llama.cpp's."""
