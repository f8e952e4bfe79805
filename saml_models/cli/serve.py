"""The command `saml serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saml_models.cli.options import Device, Experts, Model, Store, device_named
from saml_models.runtime.quiet import quiet_libraries

__all__ = ["serve"]

ENGINES = ("local", "ray")


def serve(
    model: Model = "tiny.en",
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine tokens are needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="Lines of OWNER TOKEN; each owner has voices of its own.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Clips and windows decoded together.")] = 16,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Recordings taken and not done; more are told to wait.")
    ] = 64,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 25 * 2**20,
    max_seconds: Annotated[float, typer.Option(min=1, help="Of a recording.")] = 3600.0,
    max_memory: Annotated[
        int, typer.Option(min=1, help="Bytes of decoded recordings held at once.")
    ] = 2**30,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Of another site whose pages may call; may be repeated."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local: in this process; ray: in replicas of Ray Serve.")
    ] = "local",
    replicas: Annotated[int, typer.Option(min=1, help="With --engine ray: how many.")] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="With --engine ray: a cluster's; default: this machine.")
    ] = None,
    experts: Experts = None,
    store: Store = None,
    device: Device = None,
) -> None:
    """Serve OpenAI's audio interface, many voices at one address, and a page to teach it yours."""
    quiet_libraries()
    from saml_kernels.errors import SAMLError, needs

    with needs("saml serve", "serve"):
        import uvicorn

        from saml_models.server.app import create_app
    from saml_models.server.settings import Limits, Settings, is_loopback, read_tokens
    from saml_models.speakers.store import default_folder

    if engine not in ENGINES:
        raise SAMLError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    if engine == "local" and (replicas > 1 or ray_address is not None):
        raise SAMLError("--replicas, --ray-address: need --engine ray")
    tokens = {} if token_file is None else read_tokens(token_file)
    if not tokens and not is_loopback(host):
        raise SAMLError(f"--host {host}: others can reach it; give --token-file, or 127.0.0.1")
    limits = Limits(bytes=max_bytes, seconds=max_seconds, memory=max_memory)
    named = device_named(device)
    chosen = None if experts is None else str(experts)
    settings = Settings(
        model=Path(model).name,
        limits=limits,
        tokens=tokens,
        store=store or default_folder(),
        origins=tuple(origin or ()),
        load=model,
        experts=chosen,
        device=named,
    )
    if engine == "ray":
        from saml_models.server.fleet import RayEngine

        running: Any = RayEngine(
            model, chosen, named, max_batch=max_batch, max_queue=max_queue, replicas=replicas,
            address=ray_address,
        )  # fmt: skip
    else:
        from saml_models.models.registry import bind
        from saml_models.recogniser import Recogniser
        from saml_models.server.engine import Engine

        recogniser = Recogniser.load(model, device=named, experts=chosen)
        speech = bind(recogniser.model, recogniser.processor)
        running = Engine(speech, max_batch=max_batch, max_queue=max_queue)
    with running:
        config = uvicorn.Config(
            create_app(running, settings),
            host=host,
            port=port,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        socket = config.bind_socket()
        name, number = socket.getsockname()[:2]
        at = f"[{name}]" if ":" in name else name
        typer.echo(f"{settings.model} at http://{at}:{number}")
        server.run(sockets=[socket])
