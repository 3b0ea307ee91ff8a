"""Automations of the Prefect server: they send alerts, and correct the states of runs that cannot do it themselves.

They run in the server, so that the alert about a crash does not depend on the crashed process. Alerts go to a webhook
that accepts Slack's JSON, `{"text": "..."}`; its address is stored in the Prefect block `memgpt-alerts`.
"""

import os
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.automations import Automation, AutomationCore, ChangeFlowRunState, EventTrigger, Posture, SendNotification
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

BLOCK = "memgpt-alerts"
WEBHOOK = "MEMGPT_ALERT_WEBHOOK"
UNANSWERED = "The flow was paused and never resumed."  # Prefect's message for a suspended run that timed out
HEARTBEAT = "prefect.flow-run.heartbeat"
MISSED = 3.0  # missed heartbeats after which a run counts as crashed
# States without heartbeats. A final state may have another name; then the server refuses to crash the ended run.
QUIET = ("Completed", "Failed", "Crashed", "Cancelled", "Suspended", "Paused")

_RUN = """{{ flow.name }} / {{ flow_run.name }}: {{ flow_run.state.name }}
{{ flow_run.state.message }}
{{ flow_run | ui_url }}"""
_EVENT = (
    "{{ event.payload.summary }}{% if event.payload.reasons %}: {{ event.payload.reasons }}{% endif %}"
    "{% if flow_run %}\n{{ flow_run | ui_url }}{% endif %}"
)


def ensure(days: float) -> None:
    """Create or update the server's automations as defined here; without a webhook, print how to get alerts.

    days: alert after this many days without a successful `retrain`. The window starts at the last success or alert, or
    when the automation is created or changed. Automations that need no change are left alone.
    """
    block = _webhook()
    wanted = [_crash_the_silent(), _hold_the_unanswered()]
    if block:
        wanted += _alerts(block, days)
    else:
        print(f"alerts: none; set {WEBHOOK} to a webhook's URL, or make a Custom Webhook block named {BLOCK} in the UI")
    for automation in wanted:
        _keep(automation)


def _webhook() -> UUID | None:
    """The block's id; None if there is no block. If the environment variable is set, its URL replaces the block's."""
    url = os.environ.get(WEBHOOK)
    if url:
        block = CustomWebhookNotificationBlock(
            name="memgpt", url="{{url}}", json_data={"text": "{{body}}"}, secrets={"url": url}
        )
        return block.save(BLOCK, overwrite=True)
    with get_client(sync_client=True) as client:
        try:
            return client.read_block_document_by_name(BLOCK, "custom-webhook", include_secrets=False).id
        except ObjectNotFound:
            return None


def _alerts(block: UUID, days: float) -> list[Automation]:
    runs = {"prefect.resource.id": "prefect.flow-run.*"}
    success = {"prefect.flow-run.Completed"}
    silence = EventTrigger(
        posture=Posture.Proactive,
        after=success,  # each restarts the window; otherwise the alert could be up to two windows late
        expect=success,
        match=runs,
        match_related=_flow("retrain"),
        within=timedelta(days=days),
    )
    overdue = f"retrain: no run has succeeded for {days:g} days\n{{{{ automation | ui_url }}}}"
    return [
        _alert("failed", block, _RUN, _once("Failed", {**runs, "prefect.state-message": f"!{UNANSWERED}"})),
        _alert("crashed", block, _RUN, _once("Crashed", runs)),
        _alert("rejected", block, _EVENT, _once("memgpt.gate.rejected")),
        _alert("surge", block, _EVENT, _once("memgpt.monitor.surge")),
        _alert("drift", block, _EVENT, _once("memgpt.monitor.drift")),
        _alert("overdue", block, overdue, silence),
    ]


def _alert(name: str, block: UUID, text: str, trigger: EventTrigger) -> Automation:
    action = SendNotification(block_document_id=block, subject="memgpt", body=text)
    return Automation(name=f"memgpt alert: {name}", trigger=trigger, actions=[action])


def _once(event: str, match: dict[str, Any] | None = None) -> EventTrigger:
    """At most one alert a minute per resource, because Prefect may deliver an event twice."""
    name = event if "." in event else f"prefect.flow-run.{event}"
    each = {"prefect.resource.id"}
    return EventTrigger(expect={name}, match=match or {}, for_each=each, within=timedelta(minutes=1))


def _crash_the_silent() -> Automation:
    """Marks a run without heartbeats as crashed. If its process and worker are gone, it would stay Running for ever."""
    # the setting of prefect.toml, which the flows use too
    seconds = MISSED * (get_current_settings().flows.heartbeat_frequency or 30)
    trigger = EventTrigger(
        posture=Posture.Proactive,
        after={HEARTBEAT},
        expect={HEARTBEAT, *(f"prefect.flow-run.{state}" for state in QUIET)},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        within=timedelta(seconds=seconds),
    )
    action = ChangeFlowRunState(state=StateType.CRASHED, message=f"No heartbeat for {seconds:g} seconds.")
    return Automation(name="memgpt: a silent run has crashed", trigger=trigger, actions=[action])


def _hold_the_unanswered() -> Automation:
    """Completes an approval that timed out as "Held". Prefect fails it, but here no answer means: not now."""
    match = {"prefect.resource.id": "prefect.flow-run.*", "prefect.state-message": UNANSWERED}
    trigger = EventTrigger(expect={"prefect.flow-run.Failed"}, match=match, match_related=_flow("promote"))
    action = ChangeFlowRunState(
        state=StateType.COMPLETED, name="Held", message="Nobody approved in time: the champion stays.", force=True
    )
    return Automation(name="memgpt: an unanswered promotion is held", trigger=trigger, actions=[action])


def _flow(name: str) -> dict[str, str]:
    return {"prefect.resource.role": "flow", "prefect.resource.name": name}


def _keep(wanted: Automation) -> None:
    """Create or update an automation by name; one that was disabled in the UI stays disabled. An update restarts its
    windows, so it is only made if something differs."""
    with get_client(sync_client=True) as client:
        found = client.read_automations_by_name(wanted.name)
        if not found:
            client.create_automation(AutomationCore(**wanted.model_dump(exclude={"id"})))
            return
        fields = set(AutomationCore.model_fields) - {"enabled", "owner_resource"}  # an update with an owner is refused
        if found[0].model_dump(include=fields) != wanted.model_dump(include=fields):
            core = AutomationCore(**wanted.model_dump(include=fields), enabled=found[0].enabled)
            client.update_automation(found[0].id, core)
