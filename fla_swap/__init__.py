"""fla_swap: find a Transformer's attention, prove it, swap it, distil it, compile it, run it."""
