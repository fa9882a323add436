"""A plain PyTorch script that knows nothing of ICRF: a network, data, a training loop.

``python plain_script.py`` runs it by itself; own_script.py and own_script.yaml federate it as it stands.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 64)
        self.drop = nn.Dropout(0.1)
        self.output = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.drop(torch.relu(self.hidden(x))))


def load() -> tuple:
    features, labels = load_digits(return_X_y=True)
    split = train_test_split(features.astype("float32") / 16, labels, test_size=0.2, random_state=0)
    return split[0], split[2], split[1], split[3]


def fit(model: nn.Module, features: torch.Tensor, labels: torch.Tensor, epochs: int) -> float:
    loader = DataLoader(TensorDataset(features, labels), batch_size=16, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    return loss.item()


def main() -> None:
    train_x, train_y, test_x, test_y = load()
    model = Net()
    fit(model, torch.tensor(train_x), torch.tensor(train_y), epochs=10)
    answers = model.eval()(torch.tensor(test_x)).argmax(1)
    print(f"accuracy of the script alone: {(answers == torch.tensor(test_y)).float().mean():.4f}")


if __name__ == "__main__":
    main()
