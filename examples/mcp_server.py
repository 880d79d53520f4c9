"""A small MCP server over stdio, with two tools; examples/agent_mcp.py starts it."""

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

POPULATION = {"Berlin": 3_685_265, "Madrid": 3_422_416, "Paris": 2_103_778}

server = MCPServer("cities")


@server.tool()
def population(city: str) -> int:
    """How many people live in a city."""
    if city not in POPULATION:
        # Becomes a result with isError: the model reads it, and may do better.
        raise ToolError(f"{city} is not known here, but {', '.join(POPULATION)} are.")
    return POPULATION[city]


@server.tool()
def add(numbers: list[float]) -> float:
    """The sum of numbers."""
    return sum(numbers)


if __name__ == "__main__":
    server.run("stdio")
