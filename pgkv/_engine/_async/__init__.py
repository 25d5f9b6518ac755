"""The engine for asyncio: what awaits."""
