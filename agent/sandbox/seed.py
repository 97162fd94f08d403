"""What an operator sets up once in AWS for a fleet of cameras, and does every day, as plain boto3 calls. All of it blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.sandbox.aws import ACCOUNT, REGION, Aws

GROUP = "cameras"
THING_TYPE = "camera"
TEMPLATE = "camera-fleet"
DEVICE_POLICY = "camera"
CLAIM_POLICY = "camera-claim"
BUCKET = "camera-artifacts"
RULE = "camera_fleet"
QUEUE = "camera-reports"
ARN = f"arn:aws:iot:{REGION}:{ACCOUNT}"
THING = "${iot:Connection.Thing.ThingName}"
REGISTRATION_ACTIONS = [
    "iot:AddThingToThingGroup",
    "iot:AttachPolicy",
    "iot:AttachThingPrincipal",
    "iot:CreateThing",
    "iot:DescribeThing",
    "iot:RemoveThingFromThingGroup",
    "iot:UpdateCertificate",
    "iot:UpdateThing",
]


@dataclass(frozen=True)
class Identity:
    """A certificate with its private key, both PEM."""

    certificate_arn: str
    certificate_pem: str
    private_key_pem: str


@dataclass(frozen=True)
class Fleet:
    """What `seed` made: the claim that cameras provision themselves with, and the ARNs that jobs need."""

    group_arn: str
    presign_role_arn: str
    queue_url: str
    claim: Identity
    group: str = GROUP
    template: str = TEMPLATE
    bucket: str = BUCKET


def seed(aws: Aws) -> Fleet:
    """Set up the account: group, type, policies, claim, provisioning template, bucket, roles, rule and fleet index."""
    iot = aws.client("iot")
    group_arn = iot.create_thing_group(thingGroupName=GROUP)["thingGroupArn"]
    iot.create_thing_type(thingTypeName=THING_TYPE)
    iot.create_policy(policyName=DEVICE_POLICY, policyDocument=json.dumps(device_policy()))
    iot.create_policy(policyName=CLAIM_POLICY, policyDocument=json.dumps(claim_policy()))
    registration_role = _role(aws, "camera-registration", "iot.amazonaws.com", REGISTRATION_ACTIONS, "*")
    iot.create_provisioning_template(
        templateName=TEMPLATE,
        templateBody=json.dumps(provisioning_template()),
        provisioningRoleArn=registration_role,
        enabled=True,
    )
    aws.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    presign_role = _role(aws, "camera-artifacts-read", "iot.amazonaws.com", "s3:GetObject", f"arn:aws:s3:::{BUCKET}/*")
    queue_url = aws.client("sqs").create_queue(QueueName=QUEUE)["QueueUrl"]
    rule_role = _role(
        aws, "camera-reports-write", "iot.amazonaws.com", "sqs:SendMessage", f"arn:aws:sqs:{REGION}:{ACCOUNT}:{QUEUE}"
    )
    iot.create_topic_rule(
        ruleName=RULE,
        topicRulePayload={
            "sql": "SELECT *, topic(2) AS thing_name, topic(3) AS message_kind FROM 'cameras/#'",
            "awsIotSqlVersion": "2016-03-23",
            "actions": [{"sqs": {"roleArn": rule_role, "queueUrl": queue_url, "useBase64": False}}],
        },
    )
    iot.update_indexing_configuration(
        thingIndexingConfiguration={
            "thingIndexingMode": "REGISTRY_AND_SHADOW",
            "thingConnectivityIndexingMode": "STATUS",
            "namedShadowIndexingMode": "ON",
            "filter": {"namedShadowNames": ["status"]},
        }
    )
    claim = _new_identity(aws)
    iot.attach_policy(policyName=CLAIM_POLICY, target=claim.certificate_arn)
    return Fleet(group_arn=group_arn, presign_role_arn=presign_role, queue_url=queue_url, claim=claim)


def device_policy() -> dict[str, Any]:
    """What a camera may do: connect as itself, use its own service topics, and send reports and events."""
    own = f"$aws/things/{THING}"
    services = [f"{own}/{service}/*" for service in ("jobs", "shadow", "streams", "defender")]
    tunnels = f"{own}/tunnels/notify"
    return _policy(
        (["iot:Connect"], [f"client/{THING}"]),
        (["iot:Publish"], [f"topic/{topic}" for topic in (*services, f"$aws/rules/{RULE}/cameras/{THING}/*")]),
        (["iot:Receive"], [f"topic/{topic}" for topic in (*services, tunnels)]),
        (["iot:Subscribe"], [f"topicfilter/{topic}" for topic in (*services, tunnels)]),
    )


def claim_policy() -> dict[str, Any]:
    """What the claim certificate may do: ask for a certificate and register with the one template."""
    topics = ["$aws/certificates/create-from-csr/*", f"$aws/provisioning-templates/{TEMPLATE}/provision/*"]
    return _policy(
        (["iot:Connect"], ["client/provisioning-*"]),
        (["iot:Publish", "iot:Receive"], [f"topic/{topic}" for topic in topics]),
        (["iot:Subscribe"], [f"topicfilter/{topic}" for topic in topics]),
    )


def provisioning_template() -> dict[str, Any]:
    """The template: thing `cam-<SerialNumber>` of type `camera`, in the group, with the device policy."""
    return {
        "Parameters": {"SerialNumber": {"Type": "String"}, "AWS::IoT::Certificate::Id": {"Type": "String"}},
        "Resources": {
            "certificate": {
                "Type": "AWS::IoT::Certificate",
                "Properties": {"CertificateId": {"Ref": "AWS::IoT::Certificate::Id"}, "Status": "Active"},
            },
            "thing": {
                "Type": "AWS::IoT::Thing",
                "Properties": {
                    "ThingName": {"Fn::Join": ["", ["cam-", {"Ref": "SerialNumber"}]]},
                    "AttributePayload": {"serial": {"Ref": "SerialNumber"}},
                    "ThingTypeName": THING_TYPE,
                    "ThingGroups": [GROUP],
                },
                "OverrideSettings": {
                    "AttributePayload": "MERGE",
                    "ThingTypeName": "REPLACE",
                    "ThingGroups": "DO_NOTHING",
                },
            },
            "policy": {"Type": "AWS::IoT::Policy", "Properties": {"PolicyName": DEVICE_POLICY}},
        },
    }


def register_camera(aws: Aws, thing: str) -> Identity:
    """A thing with its certificate made by the operator instead of by provisioning; it is in the group at once."""
    iot = aws.client("iot")
    iot.create_thing(thingName=thing, thingTypeName=THING_TYPE)
    iot.add_thing_to_thing_group(thingGroupName=GROUP, thingName=thing)
    identity = _new_identity(aws)
    iot.attach_policy(policyName=DEVICE_POLICY, target=identity.certificate_arn)
    iot.attach_thing_principal(thingName=thing, principal=identity.certificate_arn)
    return identity


def upload(aws: Aws, artifact: Path, key: str | None = None) -> str:
    """Put a file into the bucket; returns the S3 URL that `presigned` turns into a placeholder."""
    key = key or artifact.name
    aws.client("s3").upload_file(str(artifact), BUCKET, key)
    return f"https://s3.{REGION}.amazonaws.com/{BUCKET}/{key}"


def presigned(url: str) -> str:
    """The placeholder in a job document that AWS IoT replaces by a presigned URL of `url`."""
    return "${aws:iot:s3-presigned-url:" + url + "}"


def create_job(
    aws: Aws, fleet: Fleet, job_id: str, document: Mapping[str, Any], *, things: list[str] | None = None
) -> str:
    """Create a snapshot job for the group, or only for `things`; returns its id."""
    targets = [f"{ARN}:thing/{thing}" for thing in things] if things else [fleet.group_arn]
    created = aws.client("iot").create_job(
        jobId=job_id,
        targets=targets,
        document=json.dumps(document),
        targetSelection="SNAPSHOT",
        presignedUrlConfig={"roleArn": fleet.presign_role_arn, "expiresInSec": 3600},
    )
    return str(created["jobId"])


def cancel_job(aws: Aws, job_id: str, *, force: bool = False) -> None:
    """Cancel a job; `force` also cancels executions in progress."""
    aws.client("iot").cancel_job(jobId=job_id, force=force)


def job_execution(aws: Aws, job_id: str, thing: str) -> dict[str, Any]:
    """`status` and `statusDetails` of one camera's execution, with its numbers and times, as AWS has them."""
    execution: dict[str, Any] = aws.client("iot").describe_job_execution(jobId=job_id, thingName=thing)["execution"]
    details = execution.get("statusDetails") or {}
    return execution | {"statusDetails": details.get("detailsMap", {})}


def set_desired(aws: Aws, thing: str, desired: Mapping[str, Any], *, shadow: str = "config") -> int:
    """Set `desired` of a named shadow; returns the shadow's new version."""
    answer = aws.client("iot-data").update_thing_shadow(
        thingName=thing, shadowName=shadow, payload=json.dumps({"state": {"desired": desired}})
    )
    return int(json.loads(answer["payload"].read())["version"])


def shadow_state(aws: Aws, thing: str, *, shadow: str = "config") -> dict[str, Any]:
    """The `state` of a named shadow (`desired`, `reported`, `delta`); empty when there is no such shadow."""
    data = aws.client("iot-data")
    try:
        answer = data.get_thing_shadow(thingName=thing, shadowName=shadow)
    except data.exceptions.ResourceNotFoundException:
        return {}
    state: dict[str, Any] = json.loads(answer["payload"].read())["state"]
    return state


def take_messages(aws: Aws, fleet: Fleet) -> list[dict[str, Any]]:
    """Reports and events that came in since the last call, as `{"thing", "kind": "report"|"event", "body"}`."""
    sqs = aws.client("sqs")
    taken: list[dict[str, Any]] = []
    while messages := sqs.receive_message(QueueUrl=fleet.queue_url, MaxNumberOfMessages=10).get("Messages"):
        for message in messages:
            body = json.loads(message["Body"])
            taken.append({"thing": body.pop("thing_name"), "kind": body.pop("message_kind"), "body": body})
        sqs.delete_message_batch(
            QueueUrl=fleet.queue_url,
            Entries=[{"Id": str(i), "ReceiptHandle": m["ReceiptHandle"]} for i, m in enumerate(messages)],
        )
    return taken


def _policy(*statements: tuple[list[str], list[str]]) -> dict[str, Any]:
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": actions, "Resource": [f"{ARN}:{resource}" for resource in resources]}
            for actions, resources in statements
        ],
    }


def _role(aws: Aws, name: str, service: str, actions: str | list[str], resource: str) -> str:
    """A role that `service` may assume for `actions` on `resource`; returns its ARN."""
    iam = aws.client("iam")
    trust = {"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}
    role = iam.create_role(
        RoleName=name, AssumeRolePolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [trust]})
    )
    grant = {"Effect": "Allow", "Action": actions, "Resource": resource}
    iam.put_role_policy(
        RoleName=name,
        PolicyName=name,
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [grant]}),
    )
    return str(role["Role"]["Arn"])


def _new_identity(aws: Aws) -> Identity:
    made = aws.client("iot").create_keys_and_certificate(setAsActive=True)
    return Identity(made["certificateArn"], made["certificatePem"], made["keyPair"]["PrivateKey"])
