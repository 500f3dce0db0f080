"""A network that passes messages between the atoms of a molecule, all with all."""

import torch
from torch import Tensor, nn

FEATURES, PLACE, BONDS = 11, 3, 4  # numbers of an atom, its coordinates, kinds of bonds
ATOM = FEATURES + PLACE
HIDDEN = 128  # of the network that makes a matrix of a bond


class MessagePassing(nn.Module):
    """Messages, updates by a GRU, and a summary that attends to the atoms in turn.

    Args:
        width: Features of an atom.
        steps: Messages, and looks of the summary.

    Source:
        Gilmer et al., ICML 2017, with edge networks and Set2Set.
    """

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.steps, self.width = steps, width
        self.first = nn.Linear(FEATURES, width)
        self.edge = nn.Sequential(nn.Linear(BONDS + 1, HIDDEN), nn.ReLU())
        self.matrix = nn.Linear(HIDDEN * width, width, bias=False)
        self.offset = nn.Linear(width, width, bias=False)
        self.root = nn.Linear(width, width)
        self.update = nn.GRUCell(width, width)
        self.look = nn.LSTMCell(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, 2 width]`` of molecules, shape ``[n, atoms, 14 + 4 atoms]``."""
        atoms, place = x[..., :FEATURES], x[..., FEATURES:ATOM]
        bonds = x[..., ATOM:].view(*x.shape[:2], -1, BONDS)
        there = atoms.abs().sum(dim=2) > 0  # the others fill the tensor up
        gaps = (place[:, :, None] - place[:, None]).norm(dim=-1, keepdim=True)
        pairs = there[:, :, None] & there[:, None]
        pairs = (pairs & ~torch.eye(pairs.shape[1], dtype=torch.bool, device=x.device)).to(x.dtype)
        edges = self.edge(torch.cat([bonds, gaps], dim=-1)) * pairs[..., None]
        count = pairs.sum(dim=2, keepdim=True).clamp(min=1)
        state = torch.relu(self.first(atoms))
        for _ in range(self.steps):
            # A matrix for each pair, applied to the other atom; summed before the matrix is formed.
            mixed = torch.einsum("nabk,nbd->nakd", edges, state).flatten(2)
            message = (self.matrix(mixed) + self.offset(pairs @ state)) / count
            fresh = torch.relu(message + self.root(state))
            state = self.update(fresh.flatten(0, 1), state.flatten(0, 1)).view_as(state)
        return self._summary(state, there)

    def _summary(self, state: Tensor, there: Tensor) -> Tensor:
        """Attend to the atoms ``steps`` times, each time asking by what was found before."""
        query = state.new_zeros(len(state), 2 * self.width)
        held = (query[:, : self.width], query[:, : self.width])
        for _ in range(self.steps):
            held = self.look(query, held)
            scores = (state @ held[0][:, :, None]).squeeze(2).masked_fill(~there, -torch.inf)
            found = (scores.softmax(dim=1)[:, :, None] * state).sum(dim=1)
            query = torch.cat([held[0], found], dim=1)
        return query
