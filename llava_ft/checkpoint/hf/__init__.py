"""transformers' own layout of LLaVA: `LlavaForConditionalGeneration` and `LlavaNextForConditionalGeneration`."""
