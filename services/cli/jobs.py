"""`sluice jobs`: submit, look, watch, cancel, run again."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from services.cli.client import failures, pages
from services.cli.rendering import answer_text, lower_name, print_json, print_receipt, print_table
from services.cli.session import JsonOption, KeyOption, Session, StateDirOption, TimeoutOption
from services.runtime.errors import invalid
from sluice.inference.v1 import conversation_pb2, inference_service_pb2
from sluice.jobs.v1 import job_service_pb2 as jobs_pb2

jobs = typer.Typer(no_args_is_help=True, help="Jobs: requests that run later, at least once; each attempt is booked once.")


def state_words(job: jobs_pb2.Job) -> str:
    """A job's state for people."""
    return lower_name(jobs_pb2.JobState.Name(job.state), "JOB_STATE_")


@jobs.command("submit")
def submit_job(
    prompt: Annotated[str, typer.Argument(help="What to ask; `-` reads it from standard input.")],
    model: Annotated[str, typer.Option(help="Model or policy/NAME; empty: the default policy.")] = "",
    request_id: Annotated[str, typer.Option(help="Idempotency key: the same one never makes a second job.")] = "",
    job_class: Annotated[str, typer.Option(help="Queue class.")] = "default",
    wait: Annotated[bool, typer.Option(help="Wait for the answer and print it.")] = False,
    key: KeyOption = None,
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 300.0,
) -> None:
    """Submits a job and prints its id."""
    text = sys.stdin.read() if prompt == "-" else prompt
    request = inference_service_pb2.GenerateRequest(
        conversation=conversation_pb2.Conversation(
            messages=[conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[conversation_pb2.Part(text=text)])]
        ),
        routing=inference_service_pb2.RoutingWishes(model=model),
    )
    with Session(state_dir, timeout, key=key) as session, failures():
        client = session.client
        job = client.jobs.SubmitJob(
            jobs_pb2.SubmitJobRequest(request_id=request_id, request=request, job_class=job_class),
            timeout=min(timeout, 30.0),
            metadata=client.as_tenant,
        ).job
        print(job.id)
        if wait:
            job = watch(session, job.id)
            _print_result(session, job)


def watch(session: Session, job_id: str) -> jobs_pb2.Job:
    """Watches a job to its end, with a progress line on standard error."""
    client = session.client
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=session.errors, transient=True) as progress, failures():
        task = progress.add_task(f"job {job_id}", total=None)
        job = jobs_pb2.Job()
        request = jobs_pb2.WatchJobRequest(job_id=job_id)
        for response in client.jobs.WatchJob(request, timeout=session.timeout, metadata=client.as_tenant):
            job = response.job
            progress.update(task, description=f"job {job_id}: {state_words(job)}, attempt {job.attempt_count}")
        return job


def _print_result(session: Session, job: jobs_pb2.Job) -> None:
    if job.state == jobs_pb2.JOB_STATE_SUCCEEDED:
        print(answer_text(job.response.answer))
        return
    session.errors.print(f"{state_words(job)}: {job.error.message}", markup=False)
    raise typer.Exit(1)


JobArgument = Annotated[str, typer.Argument(help="Id of the job.")]


@jobs.command("get")
def get_job(
    job_id: JobArgument,
    receipt: Annotated[bool, typer.Option("--receipt", help="Print the receipt too.")] = False,
    key: KeyOption = None,
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Shows a job and, when it is done, its answer."""
    with Session(state_dir, timeout, key=key) as session, failures():
        client = session.client
        job = client.jobs.GetJob(jobs_pb2.GetJobRequest(job_id=job_id), timeout=timeout, metadata=client.as_tenant).job
        if as_json:
            print_json(job)
            return
        session.console.print(f"{job.id}: {state_words(job)}, {job.attempt_count} attempts", markup=False)
        if job.HasField("response"):
            print(answer_text(job.response.answer))
            if receipt:
                print_receipt(session.console, job.response.receipt)
        elif job.HasField("error"):
            session.console.print(job.error.message, markup=False)


@jobs.command("watch")
def watch_job(
    job_id: JobArgument, key: KeyOption = None, state_dir: StateDirOption = None, timeout: TimeoutOption = 600.0
) -> None:
    """Waits for a job and prints its answer."""
    with Session(state_dir, timeout, key=key) as session:
        _print_result(session, watch(session, job_id))


@jobs.command("list")
def list_jobs(
    state: Annotated[str, typer.Option(help="Only this state, say dead or running.")] = "",
    limit: Annotated[int, typer.Option(help="Most rows.", min=1)] = 50,
    key: KeyOption = None,
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Lists jobs, newest first."""
    states = {lower_name(name, "JOB_STATE_"): value for name, value in jobs_pb2.JobState.items()}
    if state and state not in states:
        raise invalid(
            "--state", f"{state!r} is no state; there are {', '.join(name for name, value in states.items() if value)}"
        )
    wanted = states[state] if state else jobs_pb2.JOB_STATE_UNSPECIFIED
    found: list[jobs_pb2.Job] = []
    with Session(state_dir, timeout, key=key) as session:
        client = session.client
        request = jobs_pb2.ListJobsRequest(state=wanted)
        for page in pages(client.jobs.ListJobs, request, client.as_tenant, timeout):
            found += page.jobs
            if len(found) >= limit:
                break
        if as_json:
            print_json(found[:limit])
            return
        print_table(
            session.console,
            ("job", "state", "attempts", "class", "made", "why"),
            [
                (
                    job.id,
                    state_words(job),
                    job.attempt_count,
                    job.job_class,
                    job.create_time.ToDatetime().isoformat(" ", "seconds"),
                    job.error.message,
                )
                for job in found[:limit]
            ],
        )


@jobs.command("cancel")
def cancel_job(
    job_id: JobArgument, key: KeyOption = None, state_dir: StateDirOption = None, timeout: TimeoutOption = 10.0
) -> None:
    """Cancels a job that is not finished; what ran is charged."""
    with Session(state_dir, timeout, key=key) as session, failures():
        client = session.client
        job = client.jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id=job_id), timeout=timeout, metadata=client.as_tenant).job
        session.console.print(f"{job.id}: {state_words(job)}", markup=False)


@jobs.command("redrive")
def redrive_job(
    job_id: JobArgument, key: KeyOption = None, state_dir: StateDirOption = None, timeout: TimeoutOption = 10.0
) -> None:
    """Runs a dead job again, with fresh attempts."""
    with Session(state_dir, timeout, key=key) as session, failures():
        client = session.client
        job = client.jobs.RedriveJob(jobs_pb2.RedriveJobRequest(job_id=job_id), timeout=timeout, metadata=client.as_tenant).job
        session.console.print(f"{job.id}: {state_words(job)}", markup=False)
