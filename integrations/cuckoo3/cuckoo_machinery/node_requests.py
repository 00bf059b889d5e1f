"""Requests of Cuckoo3's main process to a remote node, and the node's events.

Cuckoo3 waits without a limit for the events and the results of a node that is cut off, and gives each upload up after 5
minutes. Here every request ends, has time for much data, and a node that does not answer is away.
"""

import asyncio
import json
import os
from contextlib import suppress
from urllib.parse import urljoin

import aiohttp
import requests
from cuckoo.common.clients import APIBadRequestError, APIError, ClientError, NodeAPIClient
from cuckoo.common.log import CuckooGlobalLogger

from .offers import is_refusal

log = CuckooGlobalLogger(__name__)

# All in seconds.
CONNECT_TIMEOUT = 10
# A start waits for the node's machinery host.
START_TIMEOUT = 60
# Uploads and results can be large, and a reset waits for machines.
TRANSFER_TIMEOUT = 1800
RESET_TIMEOUT = 1800
# The maximum pause in a result.
READ_TIMEOUT = 60
# A node sends a comment every 15 seconds.
SILENCE_TIMEOUT = 45


class NodeAway(ClientError):
    """A node that did not answer. It may have acted on the request."""


class MachineRefused(APIBadRequestError):
    """A node that does not give a machine to a task. `reason` is the node's own."""

    def __init__(self, reason):
        super().__init__(reason)
        self.reason = reason


class HostedNodeAPI(NodeAPIClient):
    """Cuckoo3's client of a node, with timeouts."""

    async def is_new(self):
        """Reports whether the node has had no task since its start or its last reset."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self.get_state) == "waiting_main"

    async def expect_answer(self):
        """Raises `NodeAway` if the node does not answer."""
        try:
            await self._in_thread(self.ping)
        except APIError:
            pass  # an answer

    async def read_machines(self):
        """Returns the description of the node's machines."""
        machines = await self._in_thread(self.machine_list)
        return machines.to_dictlist()

    async def _in_thread(self, request):
        try:
            return await asyncio.get_running_loop().run_in_executor(None, request)
        except APIError:
            raise
        except ClientError as error:
            raise NodeAway(str(error)) from error

    async def upload_taskwork(self, zip_path):
        """Uploads a task as in Cuckoo3, whose limit of 5 minutes is too short for a large sample."""
        try:
            file = open(zip_path, "rb")
        except OSError as error:
            raise ClientError(f"The packed task cannot be read: {error}") from error
        with file:
            await self._in_time(self._post("uploadwork", TRANSFER_TIMEOUT, data={"file": file}), TRANSFER_TIMEOUT)

    async def a_reset(self):
        """Resets the node as in Cuckoo3."""
        await self._in_time(super().a_reset(), RESET_TIMEOUT)

    async def a_delete_analysis_work(self, analysis_id):
        """Deletes the node's files of an analysis as in Cuckoo3."""
        await self._in_time(super().a_delete_analysis_work(analysis_id), START_TIMEOUT)

    async def start_task(self, task_id, machine_name):
        """Starts an uploaded task as in Cuckoo3, whose limit of 5 seconds is too short for a busy node."""
        body = {"machine_name": machine_name}
        await self._in_time(self._post(f"task/{task_id}/start", START_TIMEOUT, json=body), START_TIMEOUT)

    async def _post(self, path, limit, **body):
        url, headers = urljoin(self.api_url, path), self.get_headers(encode_token=False)
        # Without an own limit, aiohttp has one of 5 minutes.
        timeout = aiohttp.ClientTimeout(total=limit, sock_connect=CONNECT_TIMEOUT)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            async with session.post(url, headers=headers, **body) as answer:
                if answer.status != 200:
                    raise _failure(answer.status, await answer.text())

    async def _in_time(self, request, limit):
        try:
            return await asyncio.wait_for(request, limit)
        except APIError:
            raise
        except (ClientError, aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise NodeAway(f"Node {self.name} does not answer: {error!r}") from error

    def download_result(self, task_id, file_path, chunk_size=256 * 1024):
        """Downloads a result as in Cuckoo3. `file_path` appears when the result is complete."""
        partial = f"{file_path}.partial"
        url = urljoin(self.api_url, f"task/{task_id}")
        try:
            with requests.get(
                url, stream=True, headers=self.get_headers(), timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)
            ) as answer:
                if answer.status_code != 200:
                    raise APIError(f"Node {self.name} has no result of task {task_id}: status {answer.status_code}")
                with open(partial, "wb") as file:
                    file.writelines(answer.iter_content(chunk_size))
                expected = answer.headers.get("Content-Length")
            size = os.path.getsize(partial)
            if expected is not None and size != int(expected):
                raise ClientError(f"The result of task {task_id} has {expected} bytes, and {size} have arrived")
            os.replace(partial, file_path)
        except OSError as error:
            # Of the network, or of this disk. Another exception would end the thread of Cuckoo3's result retriever.
            raise ClientError(f"The download of the result of task {task_id} failed: {error}") from error
        finally:
            with suppress(OSError):
                os.remove(partial)


def _failure(status, text):
    """Returns the exception for an answer that is no success."""
    if status != 400:
        return APIError(f"status {status}: {text}")
    try:
        reason = json.loads(text)["error"]
    except (ValueError, TypeError, KeyError):
        return APIBadRequestError(f"status {status}: {text}")
    return MachineRefused(reason) if is_refusal(reason) else APIBadRequestError(reason)


class EventStream:
    """The events of a node. `on_event` gets each event, and `on_end` is called once for each opened stream.

    Cuckoo3's own reader opens an ended stream again by itself. The node may be another process by then, which knows
    nothing of the tasks of the first one.
    """

    def __init__(self, client, on_event, on_end):
        self._client = client
        self._on_event = on_event
        self._on_end = on_end
        self._session = None
        self._response = None
        self.stopped = False

    async def open(self):
        """Opens the stream; raises `NodeAway` if the node does not answer."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=SILENCE_TIMEOUT)
        session = aiohttp.ClientSession(timeout=timeout)
        try:
            headers = self._client.get_headers(encode_token=False)
            response = await session.get(self._client.event_endpoint, headers=headers)
            if response.status != 200:
                raise NodeAway(f"Node {self._client.name} refuses its events: status {response.status}")
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            await session.close()
            raise NodeAway(f"Node {self._client.name} does not send its events: {error!r}") from error
        except NodeAway:
            await session.close()
            raise
        self._session, self._response = session, response

    async def read(self):
        """Reads the open stream until it ends."""
        reason = "the node has closed it"
        try:
            async for line in self._response.content:
                if line.startswith(b"data:"):
                    await self._on_event(json.loads(line[len(b"data:") :]))
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as error:
            reason = repr(error)
        finally:
            await self.close()
            if not self.stopped:
                log.error("The event stream of a node has ended", node=self._client.name, reason=reason)
            await self._on_end()

    async def close(self):
        """Ends the stream, also while it is read."""
        if self._session:
            self._response.close()
            await self._session.close()

    async def stop(self):
        """Ends the stream for good, with the main process."""
        self.stopped = True
        await self.close()
