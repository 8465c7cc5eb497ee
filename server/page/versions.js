"use strict";
// Versions of a drafter that learns: what they are, what they did, and who may change that. Needs the admin key.

const versionsTable = document.getElementById("versions");
const versionsStatus = document.getElementById("versions-status");
const adminKey = document.getElementById("admin-key");

async function admin(path, method = "GET") {
  const answer = await fetch(`/admin/${path}`, { method, headers: { Authorization: `Bearer ${adminKey.value}` } });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error.message);
  return body;
}

async function showVersions(path = "drafters", method = "GET") {
  try {
    const state = await admin(path, method);
    versionsTable.replaceChildren(heads(), ...state.versions.map((version) => row(version, state)));
    versionsStatus.textContent = `version ${state.serving} drafts for new requests`;
    document.getElementById("versions-rollback").disabled = false;
  } catch (error) {
    versionsStatus.textContent = `error: ${error.message}`;
  }
}

function heads() {
  const line = document.createElement("tr");
  for (const name of ["version", "role", "steps learned", "held-out", "tokens per round", ""]) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    line.append(cell);
  }
  return line;
}

function row(version, state) {
  const roles = ["current", "canary", "pinned"].filter((role) => state[role] === version.version);
  const number = (value) => (value === null ? "–" : value.toFixed(2));
  const line = document.createElement("tr");
  const texts = [
    String(version.version), version.not_served ? `not served: ${version.not_served}` : roles.join(", "),
    String(version.step), number(version.heldout_acceptance_length), number(version.acceptance_length),
  ];
  for (const text of texts) {
    const cell = document.createElement("td");
    cell.textContent = text;
    line.append(cell);
  }
  const buttons = document.createElement("td");
  for (const what of version.not_served ? [] : ["promote", "pin"]) {
    if (state[what === "promote" ? "current" : "pinned"] === version.version) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = what;
    button.setAttribute("aria-label", `${what} version ${version.version}`);
    button.addEventListener("click", () => showVersions(`drafters/${version.version}/${what}`, "POST"));
    buttons.append(button, " ");
  }
  line.append(buttons);
  return line;
}

document.getElementById("versions-show").addEventListener("click", () => showVersions());
document.getElementById("versions-rollback").addEventListener("click", () => showVersions("drafters/rollback", "POST"));
