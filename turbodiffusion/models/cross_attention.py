"""Attention of the Wan transformer from video tokens to what conditions them.

Shapes: B batch, L video, S text and I image tokens, E width, N heads.
"""

from einops import rearrange
from torch import Tensor, nn

from kernels.int8_linear import Tokens
from turbodiffusion.attention import DenseAttention
from turbodiffusion.models.layers import RMSNorm
from turbodiffusion.models.projections import add_projected

Memory = tuple[Tensor, Tensor]  # keys and values (B, S, E)


class CrossAttention(nn.Module):
    """Attention from video tokens to text and, for models with a CLIP tower, to image tokens, always dense.

    x, normed, and add (B, L, E), text (B, S, E), image (B, I, E) or None -> add + that (B, L, E).  In place
    of text and image may come what `memorise` has made of them.
    """

    def __init__(self, dim: int, heads: int, has_image: bool):
        super().__init__()
        self.heads, self.core = heads, DenseAttention()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        if has_image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim)

    def memorise(self, text: Tensor, image: Tensor | None) -> tuple[Memory, Memory | None]:
        """Keys and values of text and image, which do not depend on x."""
        texts = self.norm_k(self.k(text)), self.v(text)
        return texts, None if image is None else (self.norm_k_img(self.k_img(image)), self.v_img(image))

    def forward(
        self, x: Tensor | Tokens, text: Tensor | Memory, image: Tensor | Memory | None, add: Tensor
    ) -> Tensor:
        if isinstance(text, Tensor):
            text, image = self.memorise(text, image)
        q = self.norm_q(self.q(x))
        out = self._attend(q, *text)
        if image is not None:
            out = out + self._attend(q, *image)
        return add_projected(add, out, self.o)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(y, "b l (n d) -> b n l d", n=self.heads) for y in (q, k, v))
        return rearrange(self.core(q, k, v), "b n l d -> b l (n d)")
