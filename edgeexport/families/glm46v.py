"""GLM-4.6V (Flash): GLM-4.1V's modules under another name."""

from edgeexport.families.glm4v import TINY, Glm4vFamily

FAMILY = Glm4vFamily(
    model_type="glm46v",
    tiny={**TINY, "architectures": ["Glm46VForConditionalGeneration"], "model_type": "glm46v"},
)
