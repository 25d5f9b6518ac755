"""A payment endpoint that is retried while its process is killed: every order is paid once.

    python examples/payments.py                # starts a PostgreSQL of its own
    PGKV_DSN=postgresql://user@host/db python examples/payments.py

Clients send each order with an Idempotency-Key, and send it again until they are answered. The server kills
itself at the worst moment: after the payment is committed, before anything else. First the decorator alone
keeps responses, apart from the payments; then the view completes its attempt in the payment's transaction.

Look at: how many orders were paid twice, each way.
"""

import http.client
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import time

import flask
import psycopg
from werkzeug.serving import make_server

import pgkv
from pgkv import embedded
from pgkv.integrations.flask import idempotent

SCHEMA = "pgkv_example_payments"
ORDERS, CRASH_EVERY = 6, 3


def connect() -> psycopg.Connection:
    """A connection for the table of payments."""
    return psycopg.connect(os.environ["PGKV_DSN"], options=f"-c search_path={SCHEMA}")


def serve(listener: socket.socket, together: bool) -> None:
    """Serve payments, until killed."""
    store = pgkv.Store.connect(os.environ["PGKV_DSN"], schema=SCHEMA)
    app = flask.Flask("payments")

    @app.post("/payments")
    @idempotent(pgkv.Idempotency(store, lease=1), scope="")
    def pay() -> flask.Response:
        order = int(flask.request.get_data())
        with connect() as conn:
            conn.execute("INSERT INTO payments VALUES (%s)", [order])
            response = flask.Response(f"paid {order}", 201)
            if together:
                pgkv.idempotent_attempt(flask.request).complete(response, conn)
            same = "SELECT count(*) FROM payments WHERE order_id = %s"
            [[paid]] = conn.execute(same, [order]).fetchall()
        if paid == 1 and order % CRASH_EVERY == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return response

    logging.getLogger("werkzeug").disabled = True  # one line per request
    host, port = listener.getsockname()
    make_server(host, port, app, fd=listener.fileno()).serve_forever()


def send(port: int, order: int, key: str) -> int:
    """Send an order once; the status, or 0 without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/payments", str(order), {"Idempotency-Key": key})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def pay_all(together: bool) -> None:
    """Have all orders paid by a server that is started again when it was killed, and count."""
    with connect() as conn:
        conn.execute("TRUNCATE payments")
    spawn = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as listener:  # stays open when the server is killed
        port = listener.getsockname()[1]
        server, kills = spawn.Process(target=serve, args=(listener, together)), 0
        server.start()
        for order in range(ORDERS):
            while (status := send(port, order, f"{together}-{order}")) != 201:
                if not status:  # it was killed
                    server.kill()  # or it has not answered for a minute
                    server.join()
                    kills += 1
                    server = spawn.Process(target=serve, args=(listener, together))
                    server.start()
                time.sleep(0.1)
        server.kill()
        server.join()
    with connect() as conn:
        [[paid]] = conn.execute("SELECT count(*) FROM payments").fetchall()
    name = "in the payment's transaction" if together else "apart from the payments"
    print(f"records {name}: {ORDERS} orders, {kills} kills, {paid} payments, {paid - ORDERS} twice")
    assert kills == ORDERS // CRASH_EVERY
    assert paid == (ORDERS if together else ORDERS + kills)


def main() -> None:
    """Set up the tables, pay both ways, and clean up."""
    with psycopg.connect(os.environ["PGKV_DSN"], autocommit=True) as conn:
        conn.execute(f"CREATE SCHEMA {SCHEMA}")
        conn.execute(f"CREATE TABLE {SCHEMA}.payments (order_id int)")
        try:
            pay_all(together=False)
            pay_all(together=True)
        finally:
            conn.execute(f"DROP SCHEMA {SCHEMA} CASCADE")


if __name__ == "__main__":
    if "PGKV_DSN" in os.environ:
        main()
    else:  # an embedded PostgreSQL, for as long as this runs
        with tempfile.TemporaryDirectory() as directory, embedded.start(directory) as server:
            os.environ["PGKV_DSN"] = server.dsn
            main()
