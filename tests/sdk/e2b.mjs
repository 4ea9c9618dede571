// The JavaScript SDK against a running service; E2B_API_URL, E2B_SANDBOX_URL, E2B_API_KEY.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const require = createRequire(pathToFileURL(process.env.SDK_DIR + '/package.json'))
const {
  AuthenticationError, CommandExitError, FileType, FilesystemEventType, NotFoundError, Sandbox,
  SandboxNotFoundError, TimeoutError,
} = require('e2b')
const { version } = JSON.parse(readFileSync(process.env.SDK_DIR + '/node_modules/e2b/package.json'))

// No wait for an event takes longer; ends at the event.
const DEADLINE = 60_000
const scenarios = []
const scenario = (name, about, story) => scenarios.push({ name, about, story })
const pause = (ms) => new Promise((done) => setTimeout(done, ms))

async function waitFor(what, look) {
  const until = Date.now() + DEADLINE
  while (Date.now() < until) {
    const found = await look()
    if (found) return found
    await pause(50)
  }
  throw new Error(`never came: ${what}`)
}

const run = `js-${process.pid}`
let sandbox

scenario('create', 'a sandbox is made with metadata and environment, and knows itself', async () => {
  sandbox = await Sandbox.create('base', {
    timeoutMs: 600_000, metadata: { test: run, 'a b': 'c&d=ü' }, envs: { COLOR: 'blue' },
  })
  assert.equal(await sandbox.isRunning(), true)
  const info = await sandbox.getInfo()
  assert.equal(info.sandboxId, sandbox.sandboxId)
  assert.deepEqual(info.metadata, { test: run, 'a b': 'c&d=ü' })
  assert.deepEqual([info.state, info.cpuCount, info.templateId], ['running', 1, 'base'])
})

scenario('run_in_foreground', 'output, environment, user, folder and exit code come back', async () => {
  const done = await sandbox.commands.run('echo out; echo err >&2')
  assert.deepEqual([done.stdout, done.stderr, done.exitCode], ['out\n', 'err\n', 0])
  const around = await sandbox.commands.run('echo "$COLOR $SIZE"; whoami; pwd', { envs: { SIZE: '1' }, user: 'root', cwd: '/usr' })
  assert.equal(around.stdout, 'blue 1\nroot\n/usr\n')
  assert.equal((await sandbox.commands.run('whoami')).stdout, 'user\n')
  await assert.rejects(sandbox.commands.run('echo no >&2; exit 7'), (e) => e instanceof CommandExitError && e.exitCode === 7)
  const seen = []
  await sandbox.commands.run('echo ready; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo gone', {
    onStdout: async (text) => {
      seen.push(text)
      // It goes on only because its output came here.
      if (text === 'ready\n') await sandbox.files.write('/tmp/go', '')
    },
  })
  assert.deepEqual(seen, ['ready\n', 'gone\n'])
})

scenario('run_in_background', 'a background command is listed, fed, joined, killed', async () => {
  const cat = await sandbox.commands.run('cat', { background: true, stdin: true })
  assert.ok((await sandbox.commands.list()).some((p) => p.pid === cat.pid && p.cmd === '/bin/bash'))
  const joined = await sandbox.commands.connect(cat.pid)
  await sandbox.commands.sendStdin(cat.pid, 'x\n')
  await sandbox.commands.closeStdin(cat.pid)
  assert.equal((await joined.wait()).stdout, 'x\n')
  const sleep = await sandbox.commands.run('sleep 3600', { background: true })
  assert.equal(await sleep.kill(), true)
  await assert.rejects(sleep.wait(), CommandExitError)
  await waitFor('the process is gone', async () => !(await sandbox.commands.kill(sleep.pid)))
  await assert.rejects(sandbox.commands.run('exec sleep 3599', { timeoutMs: 2000 }), TimeoutError)
})

scenario('terminal', 'a terminal takes keys and is resized', async () => {
  let seen = ''
  const decoder = new TextDecoder()
  const pty = await sandbox.pty.create({ cols: 100, rows: 30, onData: (data) => { seen += decoder.decode(data) } })
  await sandbox.pty.sendInput(pty.pid, new TextEncoder().encode('stty size\n'))
  await waitFor('its size', () => seen.includes('30 100'))
  await sandbox.pty.resize(pty.pid, { cols: 120, rows: 40 })
  await sandbox.pty.sendInput(pty.pid, new TextEncoder().encode('stty size; exit\n'))
  await waitFor('its new size', () => seen.includes('40 120'))
  assert.equal((await pty.wait()).exitCode, 0)
})

scenario('files', 'files go up and come down; folders are made, listed, renamed, removed', async () => {
  const { files } = sandbox
  const info = await files.write('hello.txt', 'grüße\n')
  assert.deepEqual([info.path, info.name], ['/home/user/hello.txt', 'hello.txt'])
  assert.equal(await files.read('hello.txt'), 'grüße\n')
  const body = new Uint8Array(1 << 20).map((_, n) => n % 251)
  await files.write('/tmp/deep/er/bytes', new Blob([body]))
  assert.deepEqual(await files.read('/tmp/deep/er/bytes', { format: 'bytes' }), body)
  await files.write('/tmp/stream', new Blob([body]).stream())
  const parts = []
  for await (const part of await files.read('/tmp/stream', { format: 'stream' })) parts.push(part)
  assert.deepEqual(Buffer.concat(parts), Buffer.from(body))
  await files.write([{ path: '/tmp/many/1', data: '1' }, { path: '/tmp/many/2', data: '2' }])
  assert.equal(await files.read('/tmp/many/2'), '2')
  assert.deepEqual([await files.makeDir('tree/a'), await files.makeDir('tree/a')], [true, false])
  await files.rename('hello.txt', 'tree/a/moved')
  const [a] = await files.list('tree')
  assert.deepEqual([a.name, a.type, a.permissions], ['a', FileType.DIR, 'drwxr-xr-x'])
  const moved = await files.getInfo('tree/a/moved')
  assert.deepEqual([moved.size, moved.owner, moved.mode], [8, 'user', 0o644])
  assert.ok(Math.abs(moved.modifiedTime.getTime() - Date.now()) < 3_600_000)
  assert.deepEqual([await files.exists('tree/a/moved'), await files.exists('tree/b')], [true, false])
  await files.remove('tree')
  assert.equal(await files.exists('tree'), false)
  await assert.rejects(files.read('/no/such/file'), NotFoundError)
  await files.write('/tmp/signed', 'signed')
  const url = await sandbox.downloadUrl('/tmp/signed', { useSignatureExpiration: 300 })
  assert.equal(await (await fetch(url)).text(), 'signed')
})

scenario('watch', "a watched folder's events are pushed", async () => {
  const seen = []
  await sandbox.files.makeDir('/tmp/watched')
  const handle = await sandbox.files.watchDir('/tmp/watched', (e) => { seen.push(`${e.name} ${e.type}`) }, { recursive: true })
  await sandbox.files.write('/tmp/watched/new/file', 'x')
  await waitFor('an event', () => seen.includes(`new/file ${FilesystemEventType.CREATE}`))
  await sandbox.files.remove('/tmp/watched/new/file')
  await waitFor('its end', () => seen.includes(`new/file ${FilesystemEventType.REMOVE}`))
  await handle.stop()
})

scenario('list', 'sandboxes are found by metadata, page by page', async () => {
  const other = await Sandbox.create('base', { timeoutMs: 300_000, metadata: { test: run } })
  const query = { metadata: { test: run } }
  const pages = Sandbox.list({ query, limit: 1 })
  const found = []
  while (pages.hasNext) found.push(...await pages.nextItems())
  assert.deepEqual(found.map((s) => s.sandboxId), [other.sandboxId, sandbox.sandboxId])
  const odd = await Sandbox.list({ query: { metadata: { 'a b': 'c&d=ü' } } }).nextItems()
  assert.ok(odd.some((s) => s.sandboxId === sandbox.sandboxId))
  assert.deepEqual([await other.kill(), await Sandbox.kill(other.sandboxId)], [true, false])
})

scenario('pause_and_resume', 'a paused sandbox comes back, and the old handle works', async () => {
  await sandbox.files.write('/tmp/kept', 'kept')
  assert.deepEqual([await sandbox.pause(), await sandbox.pause()], [true, false])
  assert.equal(await sandbox.isRunning(), false)
  assert.equal((await sandbox.getInfo()).state, 'paused')
  await sandbox.connect({ timeoutMs: 600_000 })
  assert.equal(await sandbox.files.read('/tmp/kept'), 'kept')
  const other = await Sandbox.connect(sandbox.sandboxId)
  assert.equal((await other.commands.run('cat /tmp/kept')).stdout, 'kept')
  await sandbox.setTimeout(900_000)
  const { startedAt, endAt } = await sandbox.getInfo()
  assert.ok(endAt - startedAt > 800_000)
})

scenario('fork', 'a fork has the same files and a life of its own', async () => {
  const [clone] = await sandbox.fork({ count: 1, timeoutMs: 300_000 })
  assert.ok(clone instanceof Sandbox, clone)
  assert.notEqual(clone.sandboxId, sandbox.sandboxId)
  assert.equal(await clone.files.read('/tmp/kept'), 'kept')
  await clone.files.write('/tmp/kept', 'changed')
  assert.equal(await sandbox.files.read('/tmp/kept'), 'kept')
  const [now] = await clone.getMetrics()
  assert.equal(now.cpuCount, 1)
  assert.ok(now.memUsed > 0 && now.memUsed < now.memTotal)
  await clone.kill()
})

scenario('snapshot', 'a sandbox is made from a snapshot of another', async () => {
  const name = `snap-${process.pid}`
  const { snapshotId, names } = await sandbox.createSnapshot({ name })
  assert.deepEqual(names, [name])
  const made = await Sandbox.create(name, { timeoutMs: 300_000 })
  assert.equal(await made.files.read('/tmp/kept'), 'kept')
  assert.deepEqual([await Sandbox.deleteSnapshot(snapshotId), await Sandbox.deleteSnapshot(snapshotId)], [true, false])
  await made.kill()
})

scenario('kill', 'a killed sandbox is gone; a wrong key opens nothing', async () => {
  assert.equal(await sandbox.kill(), true)
  assert.equal(await sandbox.isRunning(), false)
  await assert.rejects(sandbox.getInfo(), NotFoundError)
  await assert.rejects(sandbox.commands.run('true'), SandboxNotFoundError)
  await assert.rejects(Sandbox.create('base', { apiKey: 'e2b_00' }), AuthenticationError)
})

console.log(`e2b ${version} for JavaScript`)
let failed = 0
for (const { name, about, story } of scenarios) {
  if (!name.includes(process.env.SCENARIO ?? '')) continue
  const started = Date.now()
  let word = 'ok'
  try {
    await story()
  } catch (error) {
    console.error(error)
    word = 'FAILED'
    failed += 1
  }
  console.log(`${word} ${name}: ${about} (${((Date.now() - started) / 1000).toFixed(1)} s)`)
}
console.log(`${scenarios.length} scenarios, ${failed} failed`)
process.exit(failed ? 1 : 0)
